// The AI SDK by one of its providers: texts, objects, tools, streams of all, and a call whose result goes back.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";

globalThis.AI_SDK_LOG_WARNINGS = false;
const [url, kind] = process.argv.slice(2);
const reach = { baseURL: `${url}/v1`, apiKey: "a-key" };
const openai = createOpenAI(reach);
const model = {
  compatible: () =>
    createOpenAICompatible({ ...reach, name: "flextron", supportsStructuredOutputs: true, includeUsage: true })(
      "tiny@0.6",
    ),
  chat: () => openai.chat("tiny@0.6"),
  responses: () => openai.responses("tiny@0.6"),
  anthropic: () => createAnthropic(reach)("tiny@0.6"),
}[kind]();
const fails = ({ error }) => {
  throw error;
};
const asked = { model, prompt: "a", maxRetries: 0, onError: fails };
const greedy = { ...asked, maxOutputTokens: 8, temperature: 0 };
const long = { ...asked, maxOutputTokens: 100, temperature: 1 };
const City = z.object({ name: z.string().max(4), size: z.number().int().min(0).max(9) });
const city = tool({ description: "d", inputSchema: City });
const go = tool({ description: "d", inputSchema: z.object({}), execute: async () => "x" });
const calls = (found) => found.filter((call) => !call.invalid).slice(0, 1).map((call) => [call.toolName, call.input]);
const counts = ({ inputTokens, outputTokens }) => ({ inputTokens, outputTokens });

const whole = await generateText(greedy);
const stream = streamText(greedy);
let text = "";
for await (const piece of stream.textStream) text += piece;
const object = (await generateObject({ ...long, schema: City })).object;
const objects = streamObject({ ...long, schema: City });
for await (const _ of objects.partialObjectStream);
const must = { ...long, tools: { city }, toolChoice: { type: "tool", toolName: "city" } };
const called = await generateText(must);
const calling = streamText(must);
for await (const _ of calling.fullStream);
const several = await generateText({
  ...long,
  maxOutputTokens: 80,
  tools: { go },
  stopWhen: stepCountIs(2),
  prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber ? "none" : { type: "tool", toolName: "go" } }),
});
console.log(JSON.stringify({
  whole: { text: whole.text, usage: counts(whole.usage), finish: whole.finishReason },
  streamed: { text, usage: counts(await stream.usage), finish: await stream.finishReason },
  object,
  streamed_object: await objects.object,
  calls: calls(called.toolCalls),
  streamed_calls: calls(await calling.toolCalls),
  steps: several.steps.map((step) => step.toolResults.length),
  last: several.text,
}));
