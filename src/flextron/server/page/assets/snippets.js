// A request as `curl` and as Python, to be copied. The key never stands in them.

function quoted(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

/** A shell line. */
export function asCurl(base, path, body, hasKey) {
  const parts = [`curl -N ${quoted(`${base}/${path}`)}`];
  if (hasKey) parts.push(`-H "Authorization: Bearer $FLEXTRON_API_KEY"`);
  parts.push(`--json ${quoted(JSON.stringify(body))}`);
  return parts.join(" \\\n    ");
}

function python(value, indent = "") {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map((each) => python(each, indent)).join(", ")}]`;
  if (typeof value === "object") {
    return `{${Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${python(each, indent)}`).join(", ")}}`;
  }
  // JSON's escapes of a text are Python's, too
  return JSON.stringify(value);
}

const EXTRA = new Set(["flextron", "top_k", "min_p", "repetition_penalty", "return_token_ids"]);

/** A program for OpenAI's client. */
export function asPython(base, path, body, hasKey) {
  const plain = Object.entries(body).filter(([name]) => !EXTRA.has(name) && name !== "stream_options");
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => EXTRA.has(name)));
  delete extra.return_token_ids;
  const lines = plain.map(([name, value]) => `    ${name}=${python(value)},`);
  if (Object.keys(extra).length) lines.push(`    extra_body=${python(extra)},`);
  const isChat = path.includes("chat");
  const key = hasKey ? 'os.environ["FLEXTRON_API_KEY"]' : '"none"';
  return [
    ...(hasKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${base}/v1", api_key=${key})`,
    `stream = client.${isChat ? "chat.completions" : "completions"}.create(`,
    ...lines,
    ")",
    "for chunk in stream:",
    "    for choice in chunk.choices:",
    `        print(${isChat ? 'choice.delta.content or ""' : "choice.text"}, end="", flush=True)`,
    "",
  ].join("\n");
}
