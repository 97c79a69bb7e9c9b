// What is wrong with a file of examples, found before it is sent; the server checks the same and more.

const MOST_LINE_BYTES = 12 * 1_000_000 + 65_536;
const MOST_ERRORS = 20;
const ROLES = ["system", "developer", "user", "assistant"];
const KINDS = { messages: ["messages"], prompt: ["prompt", "completion"] };

function textOf(content) {
  if (!Array.isArray(content)) return typeof content === "string" ? content : null;
  return content.every((part) => typeof part?.text === "string") ? content.map((part) => part.text).join("") : null;
}

function wrongTurn(turn, i) {
  if (typeof turn !== "object" || turn === null || Array.isArray(turn)) return `has a message ${i} that is no JSON object`;
  const { role, weight = 1 } = turn;
  const content = textOf(turn.content);
  if (!ROLES.includes(role)) return `has a message ${i} whose role is none of ${ROLES.join(", ")}`;
  const unknown = Object.keys(turn).find((name) => !["role", "content", "weight"].includes(name));
  if (unknown) return `has a message ${i} with the key “${unknown.slice(0, 50)}”, which is not supported`;
  if (content === null || (role === "assistant" && !content)) return `has a message ${i} without text`;
  if (![0, 1].includes(weight) || ("weight" in turn && role !== "assistant")) {
    return `has a message ${i} with a bad weight: 0 or 1, for the assistant’s only`;
  }
  const isFirst = role === "system" || role === "developer";
  return isFirst && i > 0 ? `has a message ${i} with the role ${role}, which only the first may have` : null;
}

function wrongTurns(turns) {
  if (!Array.isArray(turns) || !turns.length) return "has messages that are no list, or an empty one";
  const wrong = turns.map(wrongTurn).find((message) => message);
  if (wrong) return wrong;
  const isLearnt = turns.some(({ role, weight = 1 }) => role === "assistant" && weight === 1);
  const isWhole = turns.length > 1 && turns.at(-1).role === "assistant" && isLearnt;
  return isWhole ? null : "must end with an answer of the assistant, and have one to learn";
}

function wrongRecord(record, kinds) {
  if (typeof record !== "object" || record === null || Array.isArray(record)) return "is not a JSON object";
  const kind = Object.keys(KINDS).find((name) => name in record);
  if (!kind) return "has neither messages nor prompt and completion";
  const unknown = Object.keys(record).find((name) => !KINDS[kind].includes(name));
  if (unknown) return `has the key “${unknown.slice(0, 50)}”, which is not supported; leave it out`;
  kinds.add(kind);
  if (kinds.size > 1) return "is of another kind than the first: use either messages or prompt and completion";
  if (kind === "prompt") {
    const { prompt, completion } = record;
    if (typeof prompt !== "string" || typeof completion !== "string" || !completion) {
      return "must have a prompt and a completion that are texts, the completion not empty";
    }
    return null;
  }
  return wrongTurns(record.messages);
}

/** `{ count, kind, errors }` of a file's text; errors are `{ line, message }`, at most twenty. */
export function checkExamples(text, { hasChat = true } = {}) {
  const errors = [];
  const kinds = new Set();
  let count = 0;
  const lines = text.replace(/^\ufeff/, "").split("\n");
  for (let i = 0; i < lines.length && errors.length < MOST_ERRORS; i++) {
    if (!lines[i].trim()) continue;
    let message = null;
    if (lines[i].length > MOST_LINE_BYTES) message = `is longer than ${MOST_LINE_BYTES} bytes; make several examples of it`;
    else {
      try {
        message = wrongRecord(JSON.parse(lines[i]), kinds);
      } catch (error) {
        message = `is not valid JSON (${error.message})`;
      }
    }
    if (message === null && kinds.has("messages") && !hasChat) {
      message = "has messages, but the model has no chat template; use prompt and completion";
    }
    if (message) errors.push({ line: i + 1, message });
    else count++;
  }
  if (!count && !errors.length) errors.push({ line: 1, message: "begins a file without an example; give one JSON object a line" });
  return { count, kind: [...kinds][0] ?? null, errors };
}
