// Elements, numbers in words, and the one region that screen readers are told of.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** An HTML element; attributes that begin with `on` are listeners. */
export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** An SVG element. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

/** Write a text, unless it stands there already: what does not change is not drawn anew. */
export function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A labelled control: the label stands above it. */
export function field(label, control, hint = null) {
  const parts = [el("span", { class: "label" }, label), control];
  if (hint) parts.push(el("span", { class: "hint" }, hint));
  return el("label", { class: "field" }, ...parts);
}

/** Tell screen readers of something, politely. */
export function say(text) {
  document.getElementById("said").textContent = text;
}

/** Three digits that matter. */
export function short(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  for (const [limit, suffix] of [[1e9, "B"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= limit) return `${Number((value / (suffix === "k" ? 1e3 : limit)).toPrecision(3))} ${suffix}`;
  }
  return String(Number(value.toPrecision(3)));
}

/** Seconds as people say them. */
export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 100) return `${value.toFixed(1)} s`;
  return value < 5400 ? `${Math.round(value / 60)} min` : `${(value / 3600).toFixed(1)} h`;
}

/** A button that copies a text and says so. */
export function copyButton(label, text) {
  const button = el("button", { type: "button", class: "quiet" }, label);
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text());
      say("copied");
      button.dataset.done = "copied";
    } catch {
      // without HTTPS and off this machine there is no clipboard: show it to be copied by hand
      showText(label, text());
      return;
    }
    setTimeout(() => delete button.dataset.done, 1500);
  });
  return button;
}

function showText(title, text) {
  const area = el("textarea", { readonly: true, rows: 12, "aria-label": title });
  area.value = text;
  const close = el("button", { type: "button", onclick: () => box.close() }, "Close");
  const box = el("dialog", { "aria-label": title, onclose: () => box.remove() }, area, close);
  document.body.append(box);
  box.showModal();
  area.select();
}
