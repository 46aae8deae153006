// Builds elements. Strings become text nodes, so nothing that passes through here is ever parsed as HTML.

/** el("button", { type: "button", class: "quiet", on: { click } }, "Copy"); false, null and undefined leave out. */
export function el(tag, options = {}, ...children) {
  const node = document.createElement(tag);
  const { on = {}, ...attributes } = options;
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, String(value));
  }
  for (const [event, handler] of Object.entries(on)) node.addEventListener(event, handler);
  node.append(...children);
  return node;
}

export function byId(id) {
  return document.getElementById(id);
}

/** A button that copies what `text()` returns and says for a moment how that went. */
export function copyButton(text, what) {
  const button = el("button", { type: "button", class: "quiet", "aria-label": `Copy ${what}` }, "Copy");
  button.addEventListener("click", async () => {
    const copied = await copy(text());
    button.textContent = copied ? "Copied" : "Not copied";
    announce(copied ? "Copied" : "Copying failed");
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Plain HTTP from another machine: browsers keep the clipboard interface to themselves.
    const area = el("textarea", { class: "visually-hidden", "aria-hidden": "true" });
    const focused = document.activeElement;
    area.value = text;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return copied;
  }
}

/** Says something to screen readers without moving anything on the screen. */
export function announce(text) {
  byId("announcer").textContent = text;
}

const whole = new Intl.NumberFormat("en");

export function count(number, noun) {
  return `${whole.format(number)} ${noun}${number === 1 ? "" : "s"}`;
}

export function formatNumber(number) {
  return whole.format(number);
}

/** Three significant digits and a unit that suits: 850 µs, 12.3 ms, 4.2 s. */
export function formatSeconds(seconds) {
  if (seconds < 0.001) return `${(seconds * 1e6).toPrecision(2).replace(/\.0$/, "")} µs`;
  if (seconds < 0.9995) return `${trim(seconds * 1e3)} ms`;
  return `${trim(seconds)} s`;
}

export function formatRate(perSecond) {
  return perSecond >= 100 ? whole.format(Math.round(perSecond)) : trim(perSecond);
}

function trim(number) {
  return number >= 100 ? String(Math.round(number)) : String(Number(number.toPrecision(3)));
}
