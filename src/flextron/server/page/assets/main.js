// The page as a whole: facts first, then a tab at a time.
import { askForKey, json } from "./api.js";
import { Chat } from "./chat.js";
import { write } from "./dom.js";
import { Finetuning } from "./finetune.js";
import { Live } from "./live.js";
import { Models } from "./models.js";

const NAMES = ["chat", "live", "finetuning", "models"];
const parts = {};
let shown = null;

function tab(name) {
  return document.getElementById(`tab-${name}`);
}

/** Show one panel; those that are hidden ask the server nothing. */
function show(name) {
  shown = name;
  for (const each of NAMES) {
    tab(each).setAttribute("aria-selected", String(each === name));
    tab(each).tabIndex = each === name ? 0 : -1;
    document.getElementById(`panel-${each}`).hidden = each !== name;
  }
  history.replaceState(null, "", `#${name}`);
  look();
}

function look() {
  if (!parts.chat) return;
  const isVisible = document.visibilityState === "visible";
  if (isVisible && shown === "live") parts.live.start();
  else parts.live.stop();
  if (isVisible && shown === "finetuning") parts.finetuning.watch();
  else parts.finetuning.unwatch();
  if (isVisible && shown === "models") parts.models.refresh();
  if (isVisible && shown === "chat") parts.chat.refreshModels();
}

function onTabKey(event) {
  const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -NAMES.length, End: NAMES.length };
  if (!(event.key in steps)) return;
  event.preventDefault();
  const at = NAMES.indexOf(shown) + steps[event.key];
  const far = Math.abs(steps[event.key]) > 1;
  const next = far ? Math.min(Math.max(at, 0), NAMES.length - 1) : (at + NAMES.length) % NAMES.length;
  show(NAMES[next]);
  tab(NAMES[next]).focus();
}

/** Make all parts anew; what was said in the chat is gone. */
function fill(facts) {
  parts.live?.stop();
  parts.finetuning?.unwatch();
  write(document.getElementById("model-name"), facts.name);
  document.title = `${facts.name} – flextron`;
  parts.chat = new Chat(facts);
  parts.live = new Live(facts);
  const onChat = (adapter) => {
    parts.chat.compare(adapter);
    show("chat");
    parts.chat.prompt.focus();
  };
  parts.finetuning = new Finetuning(facts, onChat, () => parts.chat.refreshModels());
  parts.models = new Models(facts, fill);
  for (const name of NAMES) document.getElementById(`panel-${name}`).replaceChildren(parts[name].element);
  look();
}

async function start() {
  const problem = document.getElementById("problem");
  problem.hidden = true;
  try {
    fill(await json("page/facts"));
  } catch (error) {
    write(document.getElementById("problem-text"), error.message);
    problem.hidden = false;
  }
}

for (const name of NAMES) {
  tab(name).addEventListener("click", () => show(name));
  tab(name).addEventListener("keydown", onTabKey);
}
document.getElementById("again").addEventListener("click", start);
document.getElementById("key-cancel").addEventListener("click", () => document.getElementById("key-dialog").close());
document.getElementById("key-button").addEventListener("click", async () => {
  try {
    await askForKey("The key goes with every request from now on.");
    if (!parts.chat) await start();
  } catch {
    // the reader thought better of it
  }
});
document.addEventListener("visibilitychange", look);
const wanted = location.hash.slice(1);
show(NAMES.includes(wanted) ? wanted : "chat");
start();
