// OpenAI's Node client against a live server; tells what it got as JSON. Usage: node client.js BASE_URL
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "unused", maxRetries: 0 });
const request = {
  model: "steerwell-pilot",
  messages: [{ role: "user", content: "What is the capital of France?" }],
  temperature: 0,
  max_tokens: 12,
};
const weak = { policy: "bounded", strength: 2 };

async function streamed(fields) {
  let text = "";
  let steering = null;
  const stream = await client.chat.completions.create({ ...request, ...fields, stream: true });
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content ?? "";
    steering = chunk.steering ?? steering;
  }
  return { text, steering };
}

async function refused(fields) {
  try {
    await client.chat.completions.create({ ...request, ...fields });
  } catch (error) {
    const { status, code, param, type, message } = error;
    return { name: error.constructor.name, status, code, param, type, message };
  }
  return null;
}

async function stopped() {
  const stream = await client.chat.completions.create({ ...request, max_tokens: 500, stream: true });
  for await (const _ of stream) break; // leaving the loop closes the connection
  return stream.controller.signal.aborted;
}

const runner = client.chat.completions.stream({ ...request, stream_options: { include_usage: true } });
const models = [];
for await (const model of client.models.list()) models.push(model.id);

console.log(
  JSON.stringify({
    models,
    retrieved: (await client.models.retrieve("steerwell-pilot:honest")).id,
    chat: await client.chat.completions.create({ ...request, steering: weak }),
    named: await client.chat.completions.create({ ...request, model: "steerwell-pilot:bounded" }),
    completion: await client.completions.create({ ...request, messages: undefined, prompt: "The capital of" }),
    streamed: await streamed({ steering: weak }),
    usage: (await runner.finalChatCompletion()).usage,
    stopped: await stopped(),
    misspelt: await refused({ steerign: [] }),
    unknown: await refused({ model: "gpt-5" }),
    direction: await refused({ steering: { direction: "nothing", method: "swfc", layers: [0], strength: 1 } }),
  }),
);
