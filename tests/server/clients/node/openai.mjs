// OpenAI's client: chat, streams, structured answers, responses, embeddings.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "a-key", maxRetries: 0 });
const City = z.strictObject({ name: z.string().max(4), size: z.int().min(0).max(9) });
const asked = { model: "tiny@0.6", messages: [{ role: "user", content: "a" }], max_tokens: 9, temperature: 0 };
const responses = { model: "tiny@0.6", input: "a", max_output_tokens: 9, temperature: 0 };

const whole = await client.chat.completions.create(asked);
let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
  streamed += chunk.choices[0].delta.content ?? "";
}
const response_format = zodResponseFormat(City, "city");
const parsed = await client.chat.completions.parse({ ...asked, max_tokens: 90, temperature: 1, response_format });
const response = await client.responses.create(responses);
let response_streamed = "";
for await (const event of await client.responses.create({ ...responses, stream: true })) {
  if (event.type === "response.output_text.delta") response_streamed += event.delta;
}
const vectors = await client.embeddings.create({ model: "tiny@0.6", input: "a" });
console.log(JSON.stringify({
  whole: whole.choices[0].message.content,
  streamed,
  parsed: parsed.choices[0].message.parsed,
  response: response.output_text,
  response_streamed,
  embedding: vectors.data[0].embedding,
}));
