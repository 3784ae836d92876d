// The anthropic SDK for Node: create, stream, parse with zod, the tool runner, counts, models, errors.
// Usage: node anthropic_client.mjs BASE_URL MODEL [CASE...]. The scripted model calls get_weather once, and answers with its result.
import Anthropic from "@anthropic-ai/sdk";
import { betaZodTool } from "@anthropic-ai/sdk/helpers/beta/zod";
import { zodOutputFormat } from "@anthropic-ai/sdk/helpers/zod";
import { z } from "zod";
import { KEY, MAX_FORM_TOKENS, QUESTION, WEATHER_QUESTION, baseURL, model, refused, run } from "./cases.mjs";

const client = new Anthropic({ baseURL: baseURL.replace(/\/v1$/, ""), apiKey: KEY, maxRetries: 0 });
const WEATHER = "rain, 7 degrees";
const City = z.object({
  name: z.string(),
  continent: z.enum(["Africa", "Asia", "Europe"]),
  is_capital: z.boolean(),
  districts: z.array(z.int()),
});
const Weather = z.object({ city: z.string(), unit: z.enum(["celsius", "fahrenheit"]) });

const asking = (content = QUESTION, more = {}) => ({
  model,
  max_tokens: MAX_FORM_TOKENS,
  messages: [{ role: "user", content }],
  ...more,
});

async function runTools(more) {
  const asked = [];
  const tool = betaZodTool({
    name: "get_weather",
    description: "The weather in a city.",
    inputSchema: Weather,
    run: async (given) => {
      asked.push(given);
      return WEATHER;
    },
  });
  const final = await client.beta.messages.toolRunner(asking(WEATHER_QUESTION, { tools: [tool], ...more }));
  return { asked, text: final.content[0].text, stop_reason: final.stop_reason };
}

await run({
  create: async () => {
    const got = await client.messages.create(asking(QUESTION, { system: "Answer." }));
    const { content, stop_reason, usage } = got;
    return { text: content[0].text, stop_reason, usage, request_id: got._request_id };
  },

  stream: async () => {
    const texts = [];
    const stream = client.messages.stream(asking());
    stream.on("text", (text) => texts.push(text));
    const final = await stream.finalMessage();
    return { texts, text: await stream.finalText(), stop_reason: final.stop_reason };
  },

  raw_stream: async () => {
    const kinds = [];
    for await (const event of await client.messages.create(asking(QUESTION, { stream: true }))) kinds.push(event.type);
    return kinds;
  },

  parse: async () => {
    const asked = asking(QUESTION, { output_config: { format: zodOutputFormat(City) } });
    return City.parse((await client.messages.parse(asked)).parsed_output);
  },

  tool_runner: () => runTools(),

  tool_runner_stream: async () => {
    const asked = [];
    const tool = betaZodTool({
      name: "get_weather",
      description: "The weather in a city.",
      inputSchema: Weather,
      run: async (given) => {
        asked.push(given);
        return WEATHER;
      },
    });
    const runner = client.beta.messages.toolRunner(asking(WEATHER_QUESTION, { tools: [tool], stream: true }));
    let final;
    for await (const stream of runner) final = await stream.finalMessage();
    return { asked, text: final.content[0].text, stop_reason: final.stop_reason };
  },

  count_tokens: async () => {
    const { max_tokens, ...asked } = asking();
    const counted = await client.messages.countTokens(asked);
    return [counted.input_tokens, (await client.messages.create(asking())).usage.input_tokens];
  },

  models: async () => {
    const ids = [];
    for await (const each of client.models.list()) ids.push(each.id);
    return [ids.includes(model), (await client.models.retrieve(model)).id];
  },

  unknown_model: async () => {
    const error = await refused(() => client.messages.create(asking(QUESTION, { model: "no-such-model" })));
    return { isNotFound: error instanceof Anthropic.NotFoundError, status: error.status, error: error.error };
  },
});
