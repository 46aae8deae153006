// A model's answer as elements: paragraphs, headings, lists, quotes, code. Everything in it, tags and links included,
// is inserted as text.

import { copyButton, el } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$/;
const HEADING = /^#{1,6}\s+(.*)$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^>\s?(.*)$/;
// `code`, **strong** and *emphasis* within a line.
const INLINE = /`([^`\n]+)`|\*\*([^*\n]+)\*\*|(?<![\w*])\*([^*\s][^*\n]*)\*(?!\w)/g;
const LONGEST_STYLED_LINE = 10_000; // characters; longer ones are no prose

/** Shows a text that grows. Finished blocks are never touched again, so a long answer costs no more than its end. */
export class MarkdownView {
  #root;
  #done = 0; // characters that are in finished blocks
  #tail = null; // the element of the last block, which may still grow

  constructor(root) {
    this.#root = root;
  }

  /** text: everything so far. */
  show(text) {
    const blocks = splitBlocks(text.slice(this.#done));
    if (!blocks.length) return;
    this.#tail?.remove();
    for (const block of blocks) {
      this.#tail = renderBlock(block);
      this.#root.append(this.#tail);
    }
    this.#done += blocks[blocks.length - 1].start;
  }
}

/** Blocks { kind, lines, start } in order; start: offset of the first character. */
export function splitBlocks(text) {
  const blocks = [];
  let open = null; // the block that the next line may continue
  let fence = null; // the mark that closes an open code block
  let start = 0;
  const begin = (kind, fields = {}) => {
    open = { kind, lines: [], start, ...fields };
    blocks.push(open);
  };
  for (const raw of text.split("\n")) {
    const line = raw.replace(/\r$/, "");
    const mark = FENCE.exec(line);
    if (fence) {
      if (mark && mark[1].startsWith(fence) && !mark[2]) open = fence = null;
      else open.lines.push(line);
    } else if (mark) {
      begin("code", { language: mark[2] });
      fence = mark[1];
    } else if (!line.trim()) {
      open = null;
    } else {
      const kind = HEADING.test(line) ? "heading" : ITEM.test(line) ? "list" : QUOTE.test(line) ? "quote" : "paragraph";
      const goesOn = open && (open.kind === kind || (open.kind === "list" && /^\s/.test(line))) && kind !== "heading";
      if (!goesOn) begin(kind);
      open.lines.push(line);
    }
    start += raw.length + 1;
  }
  return blocks;
}

function renderBlock({ kind, lines, language }) {
  if (kind === "code") return renderCode(lines.join("\n"), language);
  if (kind === "heading") return el("p", { class: "heading" }, ...inline(HEADING.exec(lines[0])[1]));
  if (kind === "quote") {
    return el("blockquote", {}, ...inline(lines.map((line) => QUOTE.exec(line)[1]).join("\n")));
  }
  if (kind === "list") return renderList(lines);
  return el("p", {}, ...inline(lines.join("\n")));
}

function renderCode(code, language) {
  const label = language || "text";
  return el(
    "figure",
    { class: "code" },
    el("figcaption", {}, el("span", {}, label), copyButton(() => code, "code")),
    // Scrolls sideways, also by keyboard.
    el("pre", { tabindex: 0, role: "region", "aria-label": `Code, ${label}` }, el("code", {}, code)),
  );
}

function renderList(lines) {
  const list = el("ul", {});
  let item = null;
  for (const line of lines) {
    const match = ITEM.exec(line);
    if (match) {
      const depth = Math.min(4, Math.floor(match[1].replaceAll("\t", "    ").length / 2));
      const bullet = /\d/.test(match[2]) ? match[2] : "•";
      const text = el("span", {}, ...inline(match[3]));
      item = el("li", { class: `depth-${depth}` }, el("span", { class: "bullet" }, bullet), text);
      list.append(item);
    } else {
      item.lastChild.append("\n", ...inline(line.trim()));
    }
  }
  return list;
}

function inline(text) {
  if (text.length > LONGEST_STYLED_LINE) return [text];
  const nodes = [];
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    nodes.push(text.slice(at, match.index));
    if (match[1] !== undefined) nodes.push(el("code", {}, match[1]));
    else if (match[2] !== undefined) nodes.push(el("strong", {}, match[2]));
    else nodes.push(el("em", {}, match[3]));
    at = match.index + match[0].length;
  }
  nodes.push(text.slice(at));
  return nodes;
}
