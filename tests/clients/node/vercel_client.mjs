// Vercel's AI SDK, by both of its providers: text, streams, typed objects, functions in steps, errors.
// Usage: node vercel_client.mjs BASE_URL MODEL [CASE...]
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, Output, generateObject, generateText, stepCountIs, streamText, tool } from "ai";
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

const compatible = createOpenAICompatible({
  name: "pool",
  baseURL,
  apiKey: KEY,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const openai = createOpenAI({ baseURL, apiKey: KEY });
const providers = { compatible, openai: openai.chat };

const City = z.object({
  name: z.string().max(12),
  continent: z.enum(["Africa", "Asia", "Europe"]),
  is_capital: z.boolean(),
  districts: z.array(z.int().min(0).max(20)).max(2),
});
const Weather = z.object({ city: z.string().max(12), unit: z.enum(["celsius", "fahrenheit"]) });
const get_weather = { description: "The weather in a city.", inputSchema: Weather };

function casesOf(provider) {
  const greedy = (more = {}) => ({
    model: provider(model),
    temperature: 0,
    maxOutputTokens: MAX_TOKENS,
    maxRetries: 0,
    prompt: QUESTION,
    ...more,
  });
  const form = (more) => greedy({ maxOutputTokens: MAX_FORM_TOKENS, ...more });
  const weather = (more) => form({ prompt: WEATHER_QUESTION, toolChoice: "required", ...more });
  const callsOf = (calls) => calls.map(({ toolName, input }) => [toolName, Weather.parse(input)]);

  return {
    text: async () => {
      const { text, finishReason, usage } = await generateText(greedy());
      return { text, finishReason, usage };
    },

    stream: async () => {
      const result = streamText(greedy());
      const deltas = [];
      for await (const delta of result.textStream) deltas.push(delta);
      return { deltas, finishReason: await result.finishReason, usage: await result.usage };
    },

    messages: async () => {
      const messages = [
        { role: "user", content: [{ type: "text", text: QUESTION }] },
        { role: "assistant", content: [{ type: "text", text: "Paris." }] },
        { role: "user", content: [{ type: "text", text: QUESTION }] },
      ];
      const { usage } = await generateText(greedy({ system: "Answer.", prompt: undefined, messages }));
      return usage;
    },

    object: async () => {
      const asked = form({ prompt: CITY_QUESTION, schema: City });
      const { object, finishReason } = await generateObject(asked);
      return { object: City.parse(object), finishReason };
    },

    output_stream: async () => {
      const asked = form({ prompt: CITY_QUESTION, output: Output.object({ schema: City }) });
      return City.parse(await streamText(asked).output);
    },

    tool: async () => {
      const tools = { get_weather: tool(get_weather) };
      const { toolCalls, finishReason } = await generateText(weather({ tools }));
      return { calls: callsOf(toolCalls), finishReason };
    },

    tool_stream: async () => {
      const tools = { get_weather: tool(get_weather) };
      const result = streamText(weather({ tools }));
      return { calls: callsOf(await result.toolCalls), finishReason: await result.finishReason };
    },

    named_tool: async () => {
      const tools = { get_weather: tool(get_weather) };
      const toolChoice = { type: "tool", toolName: "get_weather" };
      return callsOf((await generateText(weather({ tools, toolChoice }))).toolCalls);
    },

    // The SDK runs the function and asks again, with the call and its result in the history.
    steps: async () => {
      const asked = [];
      const execute = async (input) => {
        asked.push(Weather.parse(input));
        return { weather: "rain ".repeat(20) };
      };
      const { steps } = await generateText(
        weather({
          tools: { get_weather: tool({ ...get_weather, execute }) },
          stopWhen: stepCountIs(2),
          prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber ? "none" : "required" }),
        }),
      );
      return {
        asked: asked.length,
        steps: steps.map(({ finishReason, usage, toolCalls }) => ({
          finishReason,
          inputTokens: usage.inputTokens,
          numCalls: toolCalls.length,
        })),
      };
    },

    unknown_model: async () => {
      const error = await refused(() => generateText(greedy({ model: provider("no-such-model") })));
      const { statusCode, message, isRetryable } = error;
      return { isCallError: APICallError.isInstance(error), statusCode, message, isRetryable };
    },
  };
}

const cases = Object.entries(providers).flatMap(([name, provider]) =>
  Object.entries(casesOf(provider)).map(([what, ask]) => [`${name}_${what}`, ask]),
);
await run(Object.fromEntries(cases));
