// The conversation: what was said, what is being answered, what the model is shown of it.

import { announce, byId } from "./dom.js";
import { AnswerTurn, UserTurn } from "./turn.js";

const STORE = "fastllm.conversation";
const NEAR_END = 80; // pixels; a reader this close to the end wants to follow

export class Chat {
  #api;
  #settings;
  #model;
  #onChange;
  #log = byId("log");
  #turns = []; // a UserTurn, its AnswerTurn, and so on
  #abort = null; // of the answer that runs
  #following = true; // the end of the conversation stays in sight

  /** model() names the chosen model; onChange() is called when an answer begins or ends and when turns come or go. */
  constructor(api, settings, { model, onChange }) {
    this.#api = api;
    this.#settings = settings;
    this.#model = model;
    this.#onChange = onChange;
    this.#log.addEventListener("grow", () => this.#follow());
    this.#log.addEventListener("scroll", () => (this.#following = this.#atEnd()));
    addEventListener("pagehide", () => this.#save()); // with what an answer under way has said so far
    new ResizeObserver(() => this.#follow()).observe(this.#log);
    this.#restore();
  }

  get running() {
    return this.#abort !== null;
  }

  get empty() {
    return this.#turns.length === 0;
  }

  send(text) {
    this.#stopNow();
    this.#add(this.#userTurn(text));
    return this.#answer();
  }

  stop() {
    this.#abort?.abort();
  }

  clear() {
    this.#truncate(0);
    announce("Conversation cleared");
  }

  #userTurn(text) {
    const turn = new UserTurn(text, (edited) => {
      this.#truncate(this.#turns.indexOf(turn));
      this.send(edited);
    });
    return turn;
  }

  #answerTurn(model) {
    const turn = new AnswerTurn(model, () => {
      this.#truncate(this.#turns.indexOf(turn));
      this.#answer();
    });
    return turn;
  }

  async #answer() {
    const model = this.#model();
    const messages = this.#messages();
    const turn = this.#answerTurn(model || "no model");
    const abort = new AbortController();
    this.#setRunning(abort);
    this.#following = true;
    this.#add(turn);
    announce("Answering");
    try {
      const body = {
        model: model || undefined,
        messages,
        ...this.#settings.request(),
        stream: true,
        // With every chunk, so that a stopped answer has its count too.
        stream_options: { include_usage: true, continuous_usage_stats: true },
      };
      let finish = null;
      for await (const chunk of this.#api.chat(body, abort.signal)) {
        if (abort.signal.aborted) break;
        turn.take(chunk);
        finish = chunk.choices[0]?.finish_reason ?? finish;
      }
      announce(`Answer ended: ${turn.end(abort.signal.aborted ? "stopped" : finish)}`);
    } catch (error) {
      if (abort.signal.aborted) announce(`Answer ended: ${turn.end("stopped")}`);
      else turn.fail(error);
    } finally {
      if (this.#abort === abort) this.#setRunning(null);
      this.#save();
      this.#onChange();
    }
  }

  /** What the model is shown: exchanges that failed without a word are left out, questions always alternate. */
  #messages() {
    const messages = this.#settings.system ? [{ role: "system", content: this.#settings.system }] : [];
    this.#turns.forEach((turn, index) => {
      const answer = turn.role === "user" ? this.#turns[index + 1] : turn;
      if (answer?.failure && !answer.text) return;
      messages.push({ role: turn.role, content: turn.text });
    });
    return messages;
  }

  #add(turn) {
    this.#turns.push(turn);
    this.#log.append(turn.root);
    this.#save();
    this.#onChange();
    this.#follow();
  }

  #truncate(length) {
    this.#stopNow();
    for (const turn of this.#turns.splice(length)) turn.root.remove();
    this.#save();
    this.#onChange();
  }

  #stopNow() {
    this.#abort?.abort();
    this.#setRunning(null);
  }

  #setRunning(abort) {
    this.#abort = abort;
    this.#log.setAttribute("aria-busy", String(abort !== null)); // said once it is complete, not word by word
  }

  #atEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.#log;
    return scrollHeight - scrollTop - clientHeight < NEAR_END;
  }

  #follow() {
    if (this.#following) this.#log.scrollTop = this.#log.scrollHeight;
  }

  #save() {
    const turns = this.#turns.map((turn) => turn.record());
    try {
      sessionStorage.setItem(STORE, JSON.stringify(turns));
    } catch {
      sessionStorage.removeItem(STORE); // too long for the browser's quota: lost at the next reload, not now
    }
  }

  #restore() {
    for (const record of JSON.parse(sessionStorage.getItem(STORE) ?? "[]")) {
      const turn = record.role === "user" ? this.#userTurn(record.text) : this.#answerTurn(record.model);
      if (record.role === "assistant") turn.restore(record);
      this.#turns.push(turn);
      this.#log.append(turn.root);
    }
    this.#follow();
  }
}
