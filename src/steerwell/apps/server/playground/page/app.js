/** The playground: one page, no build step. The form is data (requests.js), answers fill themselves (answers.js). */
import { html, render, useEffect, useLayoutEffect, useRef, useState } from "./vendor/htm-preact.js";
import { BASE, describe } from "./api.js";
import { Answer, empty, fill } from "./answers.js";
import { Chart } from "./chart.js";
import { Ask, Choice, DESK, Steer, polesOf } from "./form.js";
import { asCurl, asPython, bodyOf, changed, chosen, comparable, startForm } from "./requests.js";

const KEY = "steerwell-key"; // kept for this tab only
const FRAME = 40; // milliseconds between two drawings of answers that stream; long answers are drawn less often

function App() {
  const [info, setInfo] = useState(null);
  const [fault, setFault] = useState(null);
  const [key, setKey] = useState(sessionStorage.getItem(KEY) ?? "");
  const [form, setForm] = useState(null);

  const load = () => describe(key).then((found) => {
    setFault(null);
    setInfo(found);
    setForm((old) => old ?? startForm(found));
    render(about(found), document.getElementById("about"));
  }, setFault);
  useEffect(() => {
    sessionStorage.setItem(KEY, key);
    load();
  }, [key]);

  const change = (part) => setForm((old) => changed(old, part, info));
  return html`
    ${fault && html`<p class="error" role="alert">${fault.status === 401 ? "This server asks for an API key." : fault.message}
      ${fault.status !== 401 && html` <button type="button" onClick=${load}>Try again</button>`}</p>`}
    ${info && form && html`<${Bench} info=${info} form=${form} change=${change} keyed=${key} onKey=${setKey} />`}
    ${!info && fault && html`<${Key} value=${key} onKey=${setKey} />`}`;
}

function about(info) {
  const modes = {
    locked: "Locked: this server's policy holds for every request, so only its answer is shown.",
    policies: "Requests may choose among this server's policies, and nothing else.",
    open: "",
  };
  const text = `${modes[info.requests]} ${info.monitor_only ? "Monitor only: projections are read, nothing is edited." : ""}`;
  return html`<strong>${info.served}</strong> ${text}${info.report && html`<a href="report">Study report</a>`}`;
}

function Bench({ info, form, change, keyed, onKey }) {
  const [active, setActive] = useState(null); // the token under the pointer or in focus
  const [asked, setAsked] = useState(null); // the form that the answers on the page belong to
  const [answers, redraw] = useAnswers();
  const stop = useRef(null);
  const busy = Object.values(answers).some((answer) => answer.state === "streaming");

  const run = () => {
    stop.current?.abort();
    if (!form.prompt.trim()) return document.getElementById("prompt").focus();
    const { signal } = (stop.current = new AbortController());
    setAsked(form);
    setActive(null);
    if (!matchMedia(DESK).matches) document.querySelector(".results").scrollIntoView();
    if (comparable(info)) fill(answers.unsteered, bodyOf(form, info, true), keyed, signal, redraw);
    fill(answers.steered, bodyOf(form, info), keyed, signal, redraw);
  };
  useLayoutEffect(() => { // at once: a key that follows typing must run what was typed
    document.onkeydown = (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
      if (event.key === "Escape" && busy) stop.current.abort();
    };
  });
  return html`<div class="bench">
    <${Ask} info=${info} form=${form} change=${change} run=${run} stop=${() => stop.current.abort()} busy=${busy} />
    <div class="side">
      <${Steer} info=${info} form=${form} change=${change}><${Key} value=${keyed} onKey=${onKey} /></${Steer}>
      <${Copy} form=${form} info=${info} keyed=${Boolean(keyed)} />
    </div>
    <${Results} info=${info} answers=${answers} plan=${planOf(asked ?? form, form.view, info)} active=${active}
      setActive=${setActive} onView=${(view) => change({ view: Number(view) })} />
  </div>`;
}

/** Two answers that fill themselves, and what draws the page again soon after one has changed. */
function useAnswers() {
  const [, setCount] = useState(0);
  const answers = useRef({ unsteered: empty(), steered: empty() }).current;
  const timer = useRef(null);
  const draw = () => {
    timer.current = null;
    setCount((count) => count + 1);
  };
  const tokens = () => answers.unsteered.parts.length + answers.steered.parts.length;
  const redraw = () => (timer.current ??= setTimeout(draw, FRAME + tokens() / 5));
  return [answers, redraw];
}

/** How the projections on the page are read: along which direction, at which layer, from which side. */
function planOf(asked, wish, info) {
  const item = chosen(asked, info);
  if (!item) return null;
  const view = Math.min(wish, item.layers.length - 1);
  const sign = item.toward === "violating" && !info.monitor_only ? -1 : 1;
  const label = `${item.policy ? `${item.policy.name}: ` : ""}${item.method}, strength ${item.strength}`;
  return { ...item, view, layer: item.layers[view], sign, label, poles: polesOf(item) };
}

function Results({ info, answers, plan, active, setActive, onView }) {
  const reads = info.monitor_only || plan?.method === "monitor";
  const rows = [{ name: "Steered", answer: answers.steered, plan, reads, note: plan?.label ?? "no steering chosen" }];
  if (comparable(info)) {
    const plain = plan && { ...plan, sign: 1 };
    rows.unshift({ name: "Unsteered", answer: answers.unsteered, plan: plain, reads: true, note: "same prompt, nothing edited" });
  }
  const layer = plan && (plan.layers.length === 1 ? `layer ${plan.layer}` : html`
    <${Choice} label="layer" value=${plan.view} options=${plan.layers.map((one, index) => [index, one])} onInput=${onView} />`);
  return html`<div class="results">
    <div class="answers">${rows.map((row) => html`<${Answer} key=${row.name} ...${row} active=${active} setActive=${setActive} />`)}</div>
    <section class="panel" aria-label="Calibration">
      <h2>Calibration ${plan && html`<small>${plan.direction}, ${layer}; in class separations</small>`}</h2>
      ${plan && html`<p class="legend">
        <span class="scale">${plan.poles.violating}<i aria-hidden="true"></i>${plan.poles.aligned}</span>
        <span class="token" data-mark="below">on the ${plan.poles.violating} side</span>
        <span class="token" data-mark="edited">edited</span>
        <span>Tints and dots: before the edit. Arrow: the receipt's mean, before → after.</span></p>`}
      <${Chart} plan=${plan} rows=${rows} active=${active} />
    </section>
  </div>`;
}

function Copy({ form, info, keyed }) {
  const [done, setDone] = useState("");
  const area = useRef(null);
  const copy = async (name, write) => {
    const text = (area.current.value = write(bodyOf(form, info), BASE, keyed));
    const copied = await navigator.clipboard?.writeText(text).then(() => true, () => false);
    setDone(copied ? `${name} copied` : "Copy this text:");
  };
  return html`<section class="copy" aria-label="The steered request as code">
    <button type="button" onClick=${() => copy("Python", asPython)}>Copy as Python</button>
    <button type="button" onClick=${() => copy("curl", asCurl)}>Copy as curl</button>
    <span role="status">${done}</span>
    <textarea ref=${area} hidden=${!done} readonly rows="9" aria-label="Copied text" spellcheck="false"></textarea>
  </section>`;
}

function Key({ value, onKey }) {
  const submit = (event) => {
    event.preventDefault();
    onKey(event.target.elements.key.value.trim());
  };
  return html`<form class="key" onSubmit=${submit}>
    <label>API key <input name="key" type="password" autocomplete="off" placeholder="none" value=${value} /></label>
    <button>Use</button>
  </form>`;
}

render(html`<${App} />`, document.getElementById("app"));
