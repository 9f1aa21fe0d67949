/** The two halves of the form: what is asked, and how it is steered. */
import { html, useState } from "./vendor/htm-preact.js";
import { chosen, examplesOf, gridOf, middle, ownSteering, policyOf, strengths } from "./requests.js";

export const DESK = "(min-width: 60rem)"; // as in style.css

export function Ask({ info, form, change, run, stop, busy }) {
  const examples = examplesOf(form, info);
  const submit = (event) => {
    event.preventDefault();
    run();
  };
  return html`<form class="ask panel" onSubmit=${submit}>
    <${Words} name="system" label="Attack (system prompt)" value=${form.system} texts=${examples.attacks} change=${change} />
    <${Words} name="prompt" label="Prompt" value=${form.prompt} texts=${examples.prompts} change=${change} required=${true} />
    <div class="go">
      <button class="run" type="submit" aria-keyshortcuts="Control+Enter Meta+Enter">Run <kbd>Ctrl ↵</kbd></button>
      ${busy && html`<button type="button" onClick=${stop}>Stop <kbd>Esc</kbd></button>`}
    </div>
  </form>`;
}

function Words({ name, label, value, texts, change, required }) {
  const set = (text) => change({ [name]: text });
  return html`<div class="words">
    <label for=${name}>${label}</label>
    <textarea id=${name} rows="2" value=${value} required=${required} onInput=${(event) => set(event.target.value)}></textarea>
    ${texts.length > 0 && html`<div class="chips" role="group" aria-label="Ready texts: ${label}">${texts.map((text) => html`
      <button type="button" aria-pressed=${value === text} onClick=${() => set(value === text ? "" : text)}>${text}</button>`)}
    </div>`}
  </div>`;
}

export function Steer({ info, form, change, children }) {
  const [open] = useState(matchMedia(DESK).matches);
  const item = chosen(form, info);
  const policy = policyOf(form, info);
  const own = (part) => change({ own: { ...form.own, ...part } });
  const choose = (choice) => {
    const next = policyOf({ choice }, info);
    const taken = choice === "own" && policy ? { own: ownSteering(info, policy) } : {};
    change({ choice, view: 0, ...taken, ...(next ? { strength: next.strength } : {}) });
  };
  const options = [
    ...info.policies.map(({ name }) => [`policy:${name}`, name === info.default ? `${name} (default)` : name]),
    ...(info.requests === "open" && form.own ? [["own", "own steering …"]] : []),
    ...(form.choice === "none" || !info.policies.length ? [["none", "nothing"]] : []),
  ];
  return html`<details class="steer panel" open=${open}>
    <summary>Steering <small>${item ? brief(item) : "none"}</small></summary>
    <${Choice} label="Steer with" value=${form.choice} options=${options} onInput=${choose} disabled=${info.requests === "locked"} />
    ${policy && html`<p class="quiet">${inWords(item)}</p>`}
    ${!policy && item && html`<${Own} info=${info} item=${item} own=${own} />`}
    ${item && html`<${Strength} value=${item.strength} grid=${strengths(form, info)} fixed=${policy && !policy.bounds}
      onInput=${(strength) => (policy ? change({ strength }) : own({ strength }))} />`}
    <details><summary>Advanced</summary>
      <${Num} label="Temperature" value=${form.temperature} min="0" max="2" step="0.1" onInput=${(temperature) => change({ temperature })} />
      <${Num} label="Seed" value=${form.seed} min="0" step="1" onInput=${(seed) => change({ seed })} />
      <${Num} label="Most tokens" value=${form.max_tokens} min="1" max="512" step="1" onInput=${(max_tokens) => change({ max_tokens })} />
      ${children}
    </details>
  </details>`;
}

export const polesOf = (item) => item.calibration?.poles ?? { aligned: "aligned", violating: "violating" };
const brief = (item) =>
  `${item.policy?.name ?? item.direction} · ${item.method} · layer ${item.layers.join(", ")} · ${item.strength}`;

function inWords(item) {
  const where = `at layer ${item.layers.join(", ")}, ${item.position === "all" ? "all tokens" : "the response's tokens"}`;
  return `${item.direction}: ${item.method} ${where}, toward ${polesOf(item)[item.toward]}.`;
}

function Own({ info, item, own }) {
  const { direction, method, layers, position, toward, gate } = item;
  const names = info.directions.map(({ name }) => [name, name]);
  const choose = (name) => own(ownSteering(info, { ...item, direction: name, layers: undefined }));
  const turn = (name) => own({ method: name, strength: middle(gridOf(info, name)), gate: name === "conditional" ? direction : undefined });
  const toggle = (layer) => {
    const rest = layers.filter((one) => one !== layer);
    const next = rest.length < layers.length ? rest : [...layers, layer];
    if (next.length) own({ layers: next.sort((a, b) => a - b) });
  };
  const places = [["all", "prompt and response"], ["response", "response only"]];
  return html`
    <${Choice} label="Direction" value=${direction} options=${names} onInput=${choose} />
    <${Choice} label="Method" value=${method} options=${info.methods.map(({ name }) => [name, name])} onInput=${turn} />
    <p class="quiet">${info.methods.find(({ name }) => name === method)?.doc}</p>
    ${method === "conditional" && html`<${Choice} label="Gate" value=${gate} options=${names} onInput=${(name) => own({ gate: name })} />`}
    <fieldset><legend>Layers</legend><div class="layers">
      ${item.calibration?.layers.map(({ layer, cohens_d: d }) => html`<label title="Cohen's d ${d?.toFixed(1)}">
        <input type="checkbox" checked=${layers.includes(layer)} onChange=${() => toggle(layer)} /><span>${layer}</span></label>`)}
    </div></fieldset>
    <${Choice} label="Tokens" value=${position} options=${places} onInput=${(name) => own({ position: name })} />
    <${Choice} label="Toward" value=${toward} options=${Object.entries(polesOf(item))} onInput=${(name) => own({ toward: name })} />`;
}

/** A slider over the method's grid, and a field for what lies between. */
function Strength({ value, grid, fixed, onInput }) {
  if (fixed) return html`<p class="quiet">Strength <strong>${value}</strong>, set by the policy.</p>`;
  const at = grid.findIndex((item) => item >= value);
  return html`<div class="strength">
    <label for="strength-exact">Strength</label>
    <input id="strength" type="range" hidden=${grid.length < 2} min="0" max=${grid.length - 1} value=${at < 0 ? grid.length - 1 : at}
      aria-label="Strength, on the method's grid" aria-valuetext=${String(value)} onInput=${(event) => onInput(grid[event.target.valueAsNumber])} />
    <input type="number" step="any" id="strength-exact" value=${value} onInput=${number(onInput)} />
  </div>`;
}

export function Choice({ label, value, options, onInput, ...rest }) {
  return html`<label>${label} <select value=${value} onChange=${(event) => onInput(event.target.value)} ...${rest}>
    ${options.map(([name, text]) => html`<option value=${name}>${text}</option>`)}</select></label>`;
}

function Num({ label, value, onInput, ...limits }) {
  return html`<label>${label} <input type="number" value=${value} ...${limits} onInput=${number(onInput)} /></label>`;
}

const number = (take) => ({ target }) => Number.isFinite(target.valueAsNumber) && take(target.valueAsNumber);
