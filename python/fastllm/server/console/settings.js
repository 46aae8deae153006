// The form beside the chat: sampling, instructions, the API key. An empty field leaves the choice to the model.

import { byId } from "./dom.js";

const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
const STORE = "fastllm.settings";

export class Settings {
  /** onKey() is called after the key was changed. */
  constructor(api, { onKey }) {
    this.form = byId("settings");
    this.key = byId("api-key");
    this.key.value = api.key;
    this.key.addEventListener("change", () => {
      api.key = this.key.value.trim();
      onKey();
    });
    this.#restore();
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("input", () => this.#save());
    byId("reset").addEventListener("click", () => {
      for (const field of this.#fields()) field.value = "";
      this.#save();
    });
  }

  /** The system prompt; empty for none. */
  get system() {
    return this.form.elements.system.value.trim();
  }

  /** A sentence about the first field that holds no number; null if all is well. */
  get problem() {
    for (const name of NUMBERS) {
      const field = this.form.elements[name];
      if (field.validity.badInput) return `${field.labels[0].textContent} is not a number.`;
    }
    return null;
  }

  /** The fields of a chat request that were filled in. */
  request() {
    const fields = {};
    for (const name of NUMBERS) {
      const value = this.form.elements[name].value;
      if (value !== "") fields[name] = Number(value);
    }
    const stops = this.form.elements.stop.value.split("\n").filter((line) => line !== "");
    if (stops.length) fields.stop = stops.map((line) => line.replaceAll("\\n", "\n").replaceAll("\\t", "\t"));
    return fields;
  }

  showKeyProblem(wrong) {
    this.key.setAttribute("aria-invalid", String(wrong));
  }

  #fields() {
    return [...NUMBERS, "system", "stop"].map((name) => this.form.elements[name]);
  }

  #save() {
    const values = Object.fromEntries(this.#fields().map((field) => [field.name, field.value]));
    sessionStorage.setItem(STORE, JSON.stringify(values));
  }

  #restore() {
    const values = JSON.parse(sessionStorage.getItem(STORE) ?? "{}");
    for (const field of this.#fields()) field.value = values[field.name] ?? "";
  }
}
