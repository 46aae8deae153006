// Puts the page together: the state of the server, the model, the composer and its keys.

import { Api } from "./api.js";
import { Chat } from "./chat.js";
import { announce, byId, formatNumber } from "./dom.js";
import { Gauges } from "./gauges.js";
import { Monitor } from "./monitor.js";
import { Settings } from "./settings.js";

const MODEL = "fastllm.model";

// phase -> [word in the header, sentence above the message box; none where all is well]
const PHASES = {
  connecting: ["Connecting", ""],
  loading: ["Loading", "The model is loading. You can write already and send when it is ready."],
  ready: ["Ready", ""],
  draining: ["Stopping", "The server is stopping: it finishes what runs and takes nothing new."],
  unhealthy: ["Unhealthy", "The engine does not make progress. The server's log says more."],
  unreachable: ["Unreachable", "The server cannot be reached. This page keeps trying."],
  locked: ["Locked", "This server wants an API key. Enter it in the settings."],
};
const CLOSED = ["loading", "draining"]; // phases in which sending can only fail

const prompt = byId("prompt");
const send = byId("send");
const modelSelect = byId("model");
const toggle = byId("toggle-settings");
const panel = byId("settings-panel");

const api = new Api();
const gauges = new Gauges();
let phase = "connecting";
let modelsKnown = false;

const settings = new Settings(api, {
  onKey() {
    modelsKnown = false;
    monitor.wake();
  },
});
const chat = new Chat(api, settings, { model: () => modelSelect.value, onChange: showChat });
const monitor = new Monitor(api, { onPhase: showPhase, onReading: (reading) => gauges.show(reading) });

function showPhase(next, stats) {
  const [word, sentence] = PHASES[next] ?? [next, ""];
  const share = stats?.load_progress == null ? "" : `${Math.floor(stats.load_progress * 100)} %, `;
  byId("status-time").textContent = next === "loading" && stats ? ` ${share}${Math.round(stats.uptime_s)} s` : "";
  if (next !== phase) {
    byId("status").dataset.phase = next;
    byId("status-text").textContent = word;
    byId("notice").textContent = sentence;
    byId("notice").hidden = !sentence;
    settings.showKeyProblem(next === "locked");
    if (next !== "ready" && next !== "draining") {
      gauges.clear();
      modelsKnown = false; // what answers next may be another server
    }
    phase = next;
    showChat();
  }
  if (!modelsKnown && (next === "ready" || next === "draining")) showModels();
}

async function showModels() {
  modelsKnown = true;
  try {
    const { data } = await api.json("v1/models");
    const wanted = modelSelect.value || sessionStorage.getItem(MODEL);
    modelSelect.replaceChildren(...data.map((card) => new Option(card.id)));
    if (data.some((card) => card.id === wanted)) modelSelect.value = wanted;
    modelSelect.disabled = false;
    const lengths = new Map(data.map((card) => [card.id, card.max_model_len]));
    const showModel = () => {
      const length = lengths.get(modelSelect.value);
      byId("context").textContent = length ? `${formatNumber(length)} tokens of context` : "";
      byId("welcome-model").textContent = modelSelect.value || "the model";
      sessionStorage.setItem(MODEL, modelSelect.value);
    };
    modelSelect.onchange = showModel;
    showModel();
  } catch {
    modelsKnown = false; // the next look at the server tries again
  }
}

function showChat() {
  byId("welcome").hidden = !chat.empty;
  byId("clear").disabled = chat.empty;
  send.textContent = chat.running ? "Stop" : "Send";
  send.classList.toggle("stop", chat.running);
  send.disabled = !chat.running && CLOSED.includes(phase);
}

function submit() {
  const text = prompt.value.trim();
  if (!text || chat.running) return;
  const problem = CLOSED.includes(phase) ? PHASES[phase][1] : settings.problem;
  byId("notice").textContent = problem ?? "";
  byId("notice").hidden = !problem;
  if (problem) {
    announce(problem);
    return;
  }
  prompt.value = "";
  chat.send(text);
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (chat.running) chat.stop();
  else submit();
  prompt.focus();
});

prompt.addEventListener("keydown", (event) => {
  const plain = event.key === "Enter" && !event.shiftKey && !event.ctrlKey && !event.metaKey && !event.isComposing;
  if (!plain) return;
  event.preventDefault();
  submit();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    submit();
  } else if (event.key === "Escape" && chat.running) {
    chat.stop();
  } else if (event.key === "Escape" && toggle.getAttribute("aria-expanded") === "true") {
    showSettings(false);
    toggle.focus();
  }
});

byId("clear").addEventListener("click", () => {
  chat.clear();
  prompt.focus();
});

function showSettings(open) {
  toggle.setAttribute("aria-expanded", String(open));
  panel.classList.toggle("open", open);
}

toggle.addEventListener("click", () => {
  const open = toggle.getAttribute("aria-expanded") !== "true";
  showSettings(open);
  if (open) byId("system").focus();
});

showChat();
monitor.wake();
prompt.focus();
