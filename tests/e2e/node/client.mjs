// The unmodified openai client for Node: four requests, whose answers are printed as one JSON object.
// Usage: node client.mjs BASE_URL MODEL
import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0, timeout: 60_000 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const prompt = "The capital of France is";
const greedy = { model, temperature: 0, max_tokens: 16 };

const chat = await client.chat.completions.create({ ...greedy, messages });

let chatStream = "";
let chatUsage = null;
const chatChunks = await client.chat.completions.create({
  ...greedy,
  messages,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of chatChunks) {
  chatStream += chunk.choices[0]?.delta?.content ?? "";
  chatUsage = chunk.usage ?? chatUsage;
}

const completion = await client.completions.create({ ...greedy, prompt });

let completionStream = "";
for await (const chunk of await client.completions.create({ ...greedy, prompt, stream: true })) {
  completionStream += chunk.choices[0]?.text ?? "";
}

let unknownModel = null;
try {
  await client.chat.completions.create({ ...greedy, model: "no-such-model", messages });
} catch (error) {
  unknownModel = { status: error.status, code: error.code, param: error.param };
}

const models = [];
for await (const each of client.models.list()) models.push(each.id);

console.log(
  JSON.stringify({
    chat: chat.choices[0].message.content,
    chatFinishReason: chat.choices[0].finish_reason,
    chatUsage,
    chatStream,
    completion: completion.choices[0].text,
    completionStream,
    unknownModel,
    models,
  }),
);
