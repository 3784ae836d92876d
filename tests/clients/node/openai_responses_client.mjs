// The openai SDK's responses for Node: create, stream, parse with zod, functions, chat's runTools, errors.
// Usage: node openai_responses_client.mjs BASE_URL MODEL [CASE...]. The scripted model calls get_weather once, and answers with its result.
import OpenAI from "openai";
import { zodFunction, zodResponsesFunction, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import { KEY, QUESTION, WEATHER_QUESTION, baseURL, model, refused, run } from "./cases.mjs";

const client = new OpenAI({ baseURL, apiKey: KEY, maxRetries: 0 });
const WEATHER = "rain, 7 degrees";
const City = z.object({
  name: z.string(),
  continent: z.enum(["Africa", "Asia", "Europe"]),
  is_capital: z.boolean(),
  districts: z.array(z.int()),
});
const Weather = z.object({ city: z.string(), unit: z.enum(["celsius", "fahrenheit"]) });
const asking = (input = QUESTION, more = {}) => ({ model, input, store: false, ...more });
const weatherTool = zodResponsesFunction({ name: "get_weather", parameters: Weather });

await run({
  create: async () => {
    const got = await client.responses.create(asking(QUESTION, { instructions: "Answer." }));
    return { text: got.output_text, status: got.status, usage: got.usage };
  },

  stream: async () => {
    const kinds = [];
    const numbers = [];
    const stream = client.responses.stream(asking());
    for await (const event of stream) {
      kinds.push(event.type);
      numbers.push(event.sequence_number);
    }
    return { kinds, numbers, text: (await stream.finalResponse()).output_text };
  },

  parse: async () => {
    const asked = asking(QUESTION, { text: { format: zodTextFormat(City, "city") } });
    return City.parse((await client.responses.parse(asked)).output_parsed);
  },

  tools: async () => {
    const input = [{ role: "user", content: WEATHER_QUESTION }];
    const first = await client.responses.parse(asking(input, { tools: [weatherTool] }));
    const call = first.output.find((item) => item.type === "function_call");
    const { parsed_arguments, ...sent } = call;
    const result = { type: "function_call_output", call_id: call.call_id, output: WEATHER };
    const second = await client.responses.create(asking([...input, sent, result], { tools: [weatherTool] }));
    return { call: [call.name, Weather.parse(parsed_arguments)], text: second.output_text };
  },

  run_tools: async () => {
    const asked = [];
    const tool = zodFunction({
      name: "get_weather",
      parameters: Weather,
      function: async (given) => {
        asked.push(given);
        return WEATHER;
      },
    });
    const messages = [{ role: "user", content: WEATHER_QUESTION }];
    const runner = client.chat.completions.runTools({ model, messages, tools: [tool], stream: true });
    return { asked, text: await runner.finalContent() };
  },

  unknown_model: async () => {
    const error = await refused(() => client.responses.create(asking(QUESTION, { model: "no-such-model" })));
    return { isNotFound: error instanceof OpenAI.NotFoundError, status: error.status, code: error.code };
  },
});
