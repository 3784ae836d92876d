// The openai SDK for Node: plain, `.stream()`, `.parse()` with zod, functions and `runTools`, errors.
// Usage: node openai_client.mjs BASE_URL MODEL [CASE...]
import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import {
  CITY_QUESTION,
  KEY,
  MAX_FORM_TOKENS,
  MAX_TOKENS,
  QUESTION,
  WEATHER_QUESTION,
  baseURL,
  model,
  refused,
  run,
} from "./cases.mjs";

const client = new OpenAI({ baseURL, apiKey: KEY, maxRetries: 0, timeout: 120_000 });
const completions = client.chat.completions;
const user = (content) => [{ role: "user", content }];
const greedy = (more = {}) => ({
  model,
  temperature: 0,
  max_tokens: MAX_TOKENS,
  messages: user(QUESTION),
  ...more,
});

const City = z.object({
  name: z.string().max(12),
  continent: z.enum(["Africa", "Asia", "Europe"]),
  is_capital: z.boolean(),
  districts: z.array(z.int().min(0).max(20)).max(2),
});
const Weather = z.object({ city: z.string().max(12), unit: z.enum(["celsius", "fahrenheit"]) });

const city = () =>
  greedy({
    messages: user(CITY_QUESTION),
    response_format: zodResponseFormat(City, "city"),
    max_tokens: MAX_FORM_TOKENS,
  });
const weather = (more = {}) =>
  greedy({
    messages: user(WEATHER_QUESTION),
    tools: [zodFunction({ name: "get_weather", parameters: Weather })],
    tool_choice: "required",
    parallel_tool_calls: false,
    max_tokens: MAX_FORM_TOKENS,
    ...more,
  });
const callsOf = (message) =>
  message.tool_calls.map((call) => [call.id, call.type, call.function.name, call.function.parsed_arguments]);

await run({
  chat: async () => {
    const answer = await completions.create(greedy());
    const { message, finish_reason } = answer.choices[0];
    return { content: message.content, finish_reason, usage: answer.usage, request_id: answer._request_id };
  },

  chat_stream: async () => {
    const deltas = [];
    const stream = completions.stream(greedy({ stream_options: { include_usage: true } }));
    stream.on("content", (delta) => deltas.push(delta));
    const final = await stream.finalChatCompletion();
    const { message, finish_reason } = final.choices[0];
    return { deltas, content: message.content, finish_reason, usage: final.usage };
  },

  parse: async () => {
    const choice = (await completions.parse(city())).choices[0];
    return { parsed: City.parse(choice.message.parsed), finish_reason: choice.finish_reason };
  },

  parse_stream: async () => {
    const final = await completions.stream(city()).finalChatCompletion();
    return City.parse(final.choices[0].message.parsed);
  },

  function: async () => {
    const choice = (await completions.parse(weather())).choices[0];
    const calls = callsOf(choice.message);
    calls.forEach((call) => Weather.parse(call[3]));
    return { calls, finish_reason: choice.finish_reason };
  },

  function_stream: async () => {
    const choice = (await completions.stream(weather()).finalChatCompletion()).choices[0];
    return { calls: callsOf(choice.message), finish_reason: choice.finish_reason };
  },

  // The helper sends the call, runs the function, sends its result back and reads the answer.
  run_tools: async () => {
    const asked = [];
    const tool = zodFunction({
      name: "get_weather",
      parameters: Weather,
      function: async (given) => {
        asked.push(Weather.parse(given));
        return "rain";
      },
    });
    const choice = { type: "function", function: { name: "get_weather" } };
    const runner = completions.runTools(weather({ tools: [tool], tool_choice: choice }));
    await runner.done();
    return { asked, roles: runner.messages.map((message) => message.role) };
  },

  unknown_model: async () => {
    const error = await refused(() => completions.create(greedy({ model: "no-such-model" })));
    const { status, code, param, message } = error;
    return { isNotFound: error instanceof OpenAI.NotFoundError, status, code, param, message };
  },
});
