// One turn of the conversation and how it looks: what the user said, or what the model answered.

import { copyButton, count, el, formatRate, formatSeconds } from "./dom.js";
import { MarkdownView } from "./markdown.js";

const FINISHED = { length: "cut off at the token limit", stop: "", stopped: "stopped by you" };

class Turn {
  constructor(label, role) {
    this.role = role;
    this.text = "";
    this.content = el("div", { class: "content" });
    this.actions = el("div", { class: "actions" });
    this.root = el(
      "article",
      { class: `turn ${role}`, "aria-label": label },
      el("h3", { class: "who" }, label),
      el("div", { class: "body" }, this.content, el("div", { class: "foot" }, this.actions)),
    );
  }
}

export class UserTurn extends Turn {
  #onEdit;

  /** onEdit(text) is called when another text was sent in place of this one. */
  constructor(text, onEdit) {
    super("You", "user");
    this.text = text;
    this.#onEdit = onEdit;
    this.actions.append(copyButton(() => this.text, "your message"));
    this.actions.append(el("button", { type: "button", class: "quiet", on: { click: () => this.#edit() } }, "Edit"));
    this.content.append(el("p", {}, text));
  }

  record() {
    return { role: this.role, text: this.text };
  }

  #edit() {
    if (this.content.querySelector("form")) return;
    const area = el("textarea", { "aria-label": "Edit your message", rows: 3 });
    area.value = this.text;
    const close = () => {
      this.content.replaceChildren(el("p", {}, this.text));
      this.actions.lastChild.focus();
    };
    const send = (event) => {
      event.preventDefault();
      const text = area.value.trim();
      if (text) this.#onEdit(text);
    };
    const cancel = el("button", { type: "button", on: { click: close } }, "Cancel");
    const form = el(
      "form",
      { on: { submit: send } },
      area,
      el("div", { class: "row start" }, el("button", { type: "submit", class: "primary" }, "Send again"), cancel),
    );
    form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send(event);
      if (event.key === "Escape") close();
      if (event.key === "Escape" || event.key === "Enter") event.stopPropagation();
    });
    this.content.replaceChildren(form);
    area.focus();
  }
}

export class AnswerTurn extends Turn {
  #thinking = null; // the element of the reasoning, once there is some
  #view;
  #copy;
  #meta;
  #error = el("div", { class: "error", role: "alert" });
  #frame = null;
  #nextPaint = 0;
  #sent = performance.now();
  #first = null; // { at, tokens } of the first text
  #last = null;
  usage = null;
  reasoning = "";
  failure = null; // { title, sentence }

  /** onRegenerate() is called when another answer is wanted in place of this one. */
  constructor(model, onRegenerate) {
    super(model, "assistant");
    this.model = model;
    this.prose = el("div", { class: "prose" });
    this.#view = new MarkdownView(this.prose);
    this.#meta = el("p", { class: "meta" }, "waiting for the first token");
    this.content.append(this.prose, this.#error);
    this.root.querySelector(".foot").prepend(this.#meta);
    this.#copy = copyButton(() => this.text, "the answer");
    const again = el("button", { type: "button", class: "quiet", on: { click: onRegenerate } }, "Regenerate");
    this.actions.append(this.#copy, again);
    this.actions.hidden = true;
    this.root.classList.add("running");
  }

  /** A chunk of the stream. */
  take(chunk) {
    if (chunk.usage) this.usage = chunk.usage;
    const delta = chunk.choices[0]?.delta;
    const reasoning = delta?.reasoning ?? delta?.reasoning_content ?? "";
    if (!delta?.content && !reasoning) return;
    this.text += delta.content ?? "";
    this.reasoning += reasoning;
    this.#last = { at: performance.now(), tokens: this.usage?.completion_tokens ?? 0 };
    this.#first ??= this.#last;
    this.#frame ??= requestAnimationFrame(() => this.#paintIfDue());
  }

  /** finish: the server's reason, or "stopped". */
  end(finish) {
    const words = FINISHED[finish] ?? finish ?? "";
    this.#finish(words);
    return [count(this.usage?.completion_tokens ?? 0, "token"), words].filter(Boolean).join(", ");
  }

  /** error: an ApiError, or a bug of ours. */
  fail(error) {
    const retry = error.retryAfter ? ` Try again in ${count(error.retryAfter, "second")}.` : "";
    const left = this.text ? "" : " The model will not see this exchange again.";
    this.failure = { title: error.title ?? "This page failed", sentence: `${error.message}${retry}${left}` };
    this.#finish(this.text ? "incomplete" : "");
  }

  record() {
    const { role, model, text, reasoning, failure } = this;
    return { role, model, text, reasoning, failure, note: this.#meta.textContent };
  }

  /** An answer as it was when the page was left. */
  restore({ text, reasoning, failure, note }) {
    Object.assign(this, { text, reasoning, failure });
    this.#finish("");
    this.#note(note);
  }

  #finish(words) {
    cancelAnimationFrame(this.#frame);
    this.root.classList.remove("running");
    this.actions.hidden = false;
    this.#copy.hidden = !this.text;
    this.#paint();
    if (this.failure) {
      this.#error.replaceChildren(el("strong", {}, this.failure.title), el("p", {}, this.failure.sentence));
    } else if (!this.text && !this.reasoning) {
      this.prose.replaceChildren(el("p", { class: "empty" }, "No text"));
    }
    this.#note([...this.#figures(), words].filter(Boolean).join(" · "));
  }

  #note(text) {
    this.#meta.textContent = text;
    this.root.dispatchEvent(new CustomEvent("grow", { bubbles: true }));
  }

  /** At most one paint a frame, and never more than an eighth of the time: a fast model writes faster than we draw. */
  #paintIfDue() {
    this.#frame = null;
    const start = performance.now();
    if (start < this.#nextPaint) {
      this.#frame = requestAnimationFrame(() => this.#paintIfDue());
      return;
    }
    this.#paint();
    this.#note(this.#figures().join(" · "));
    this.#nextPaint = start + 8 * (performance.now() - start);
  }

  #paint() {
    if (this.reasoning && !this.#thinking) {
      this.#thinking = el("div", { class: "thought" });
      this.content.prepend(el("details", {}, el("summary", {}, "Thinking"), this.#thinking));
    }
    if (this.#thinking) this.#thinking.textContent = this.reasoning;
    this.#view.show(this.text);
  }

  #figures() {
    const { usage } = this;
    if (!this.#first) return [];
    const figures = [];
    if (usage) figures.push(count(usage.completion_tokens, "token"));
    const seconds = (this.#last.at - this.#first.at) / 1e3;
    const tokens = this.#last.tokens - this.#first.tokens;
    if (tokens > 0 && seconds > 0) figures.push(`${formatRate(tokens / seconds)} tokens/s`);
    figures.push(`first after ${formatSeconds((this.#first.at - this.#sent) / 1e3)}`);
    const cached = usage?.prompt_tokens_details?.cached_tokens;
    if (usage) figures.push(`${count(usage.prompt_tokens, "prompt token")}${cached ? `, ${cached} cached` : ""}`);
    return figures;
  }
}
