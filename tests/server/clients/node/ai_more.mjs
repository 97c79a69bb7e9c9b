// The AI SDK: completions and embeddings.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateText, streamText } from "ai";

const provider = createOpenAICompatible({ name: "flextron", baseURL: `${process.argv[2]}/v1`, apiKey: "a-key" });
const asked = { model: provider.completionModel("tiny@0.6"), prompt: "In", maxOutputTokens: 8, temperature: 0 };
const whole = await generateText({ ...asked, maxRetries: 0 });
let streamed = "";
for await (const piece of streamText({ ...asked, maxRetries: 0 }).textStream) streamed += piece;
const embedded = await embedMany({ model: provider.embeddingModel("tiny@0.6"), values: ["a", "b"], maxRetries: 0 });
console.log(JSON.stringify({ whole: whole.text, streamed, vectors: embedded.embeddings }));
