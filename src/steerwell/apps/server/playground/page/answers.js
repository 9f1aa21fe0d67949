/** Answers while they stream: text as tokens with projections, and the receipt below. */
import { html } from "./vendor/htm-preact.js";
import { stream } from "./api.js";

export const empty = () => ({ state: "idle", parts: [], steering: null, error: null });

/** Fill `answer` from the server; calls `changed` after every change and never throws. */
export async function fill(answer, body, key, signal, changed) {
  Object.assign(answer, empty(), { state: "streaming" });
  changed();
  let held = []; // tokens whose text is still to come: half a character, or what may become a stop string
  try {
    for await (const chunk of stream(body, key, signal)) {
      held.push(...(chunk.steering?.tokens ?? []));
      const text = chunk.choices[0]?.delta?.content;
      if (text) held = (answer.parts.push(...cut(text, held)), []);
      if (chunk.steering?.receipts) answer.steering = chunk.steering;
      changed();
    }
    answer.state = "done";
  } catch (error) {
    answer.state = error.name === "AbortError" ? "stopped" : "error";
    answer.error = error;
  }
  changed();
}

/** The text as its tokens where their texts join to it, else as one part that stands for them all. */
function cut(text, tokens) {
  if (tokens.map((token) => token.text).join("") === text) return tokens.filter((token) => token.text);
  const terms = tokens[0]?.projections.map((_, term) => term) ?? [];
  return [{
    text,
    projections: terms.map((term) => tokens.reduce((sum, token) => sum + token.projections[term], 0) / tokens.length),
    edited: terms.map((term) => tokens.some((token) => token.edited[term])),
  }];
}

/** A projection in class separations from the boundary: 0.5 is the aligned mean, -0.5 the violating one. */
export function separations(projection, plan) {
  const layer = plan?.calibration?.layers.find((item) => item.layer === plan.layer);
  if (!layer || projection === null || projection === undefined) return NaN;
  return (plan.sign * projection - layer.boundary) / (layer.mu_aligned - layer.mu_violating);
}

export const reading = (part, plan) => separations(part.projections[plan?.view], plan);
export const marked = (part) => part.edited.some(Boolean);
export const signed = (value, digits = 2) =>
  Number.isFinite(value) ? `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(digits)}` : "–";

/** What can be said of one token in words. */
function words(part, plan, reads) {
  const z = reading(part, plan);
  if (!Number.isFinite(z)) return "no projection";
  const side = `${z < 0 ? plan.poles.violating : plan.poles.aligned} side`;
  const fate = reads ? "" : ` before the edit, ${marked(part) ? "edited" : "not edited"}`;
  return `${signed(z)} class separations, ${side}${fate}`;
}

/** One answer; `reads`: its steering only reads, so its flags tell the violating side and not an edit. */
export function Answer({ name, answer, plan, reads, active, setActive, note }) {
  const { state, parts, steering, error } = answer;
  const busy = state === "streaming";
  const at = active?.name === name ? active.at : -1;
  const onActive = (index) => (spot) => setActive(spot && { name, at: index, ...spot });
  return html`<section class="answer" data-name=${name} data-state=${state} aria-label="${name} answer">
    <h2>${name} <small>${busy ? "writing …" : state === "stopped" ? "stopped" : note}</small></h2>
    <div class="paper">
      <div class="text" aria-live="polite" aria-busy=${busy} onPointerLeave=${() => setActive(null)}
        onKeyDown=${(event) => walk(event, at, parts.length - 1, setActive)}>
        ${parts.map((part, index) => html`<${Token} key=${index} part=${part} z=${reading(part, plan)} reads=${reads}
          first=${index === Math.max(at, 0)} active=${index === at} onActive=${onActive(index)} />`)}
        ${busy && html`<span class="caret" aria-hidden="true"></span>`}
        ${state === "idle" && html`<span class="quiet">The ${name.toLowerCase()} answer appears here.</span>`}
      </div>
      ${parts[at] && html`<span class="tip" id="tip" role="tooltip" style=${{ left: active.left, top: active.top }}>
        ${words(parts[at], plan, reads)}</span>`}
    </div>
    ${state === "error" && html`<p class="error" role="alert">
      ${error.param && html`<code>${error.param}</code> `}${error.message}</p>`}
    ${steering && html`<${Receipt} steering=${steering} reads=${reads} />`}
  </section>`;
}

/** One token; the space before a word stays untinted, so that words stand apart. */
function Token({ part, z, reads, first, active, onActive }) {
  const side = !Number.isFinite(z) ? "" : z < 0 ? "violating" : "aligned";
  const mark = !marked(part) ? "" : reads ? "below" : "edited";
  const word = part.text.trim() ? part.text.trimStart() : part.text;
  const show = ({ currentTarget: token }) => {
    const room = token.parentElement.clientWidth;
    const left = Math.max(0, Math.min(token.offsetLeft, room - Math.min(230, room)));
    onActive({ left: `${left}px`, top: `${token.offsetTop + token.offsetHeight + 4}px` });
  };
  return html`${part.text.slice(0, part.text.length - word.length)}<span class="token" tabindex=${first ? 0 : -1}
    data-side=${side} data-mark=${mark} data-active=${active} aria-describedby=${active && "tip"}
    style=${{ "--much": side ? Math.min(Math.sqrt(Math.abs(z) / 1.5), 1) : 0 }}
    onPointerEnter=${show} onFocus=${show} onBlur=${() => onActive(null)}>${word}</span>`;
}

/** One token of an answer is in the tab order; arrow keys, Home and End walk to the others. */
function walk(event, at, last, setActive) {
  const steps = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: last };
  if (event.key === "Escape") setActive(null);
  if (!(event.key in steps)) return;
  event.preventDefault();
  event.currentTarget.querySelectorAll(".token")[Math.max(0, Math.min(steps[event.key], last))]?.focus();
}

function Receipt({ steering, reads }) {
  const receipt = steering.receipts[0];
  if (!receipt) return html`<p class="quiet">Not steered: no receipt.</p>`;
  const share = (term) => (term.tokens_seen ? Math.round((100 * term.tokens_edited) / term.tokens_seen) : 0);
  return html`<table class="receipt">
    <caption>Receipt <code>${receipt.edit_id}</code>${" "}
      ${steering.flagged?.[0] && html`<strong>flagged: stays on the violating side</strong>`}</caption>
    <thead><tr>
      <th scope="col">Layer</th>
      <th scope="col">${reads ? "Violating side" : "Tokens edited"}</th>
      <th scope="col">Mean projection</th>
      <th scope="col">Mean |h′\u00a0−\u00a0h|</th>
    </tr></thead>
    <tbody>${receipt.terms.map((term) => html`<tr>
      <td>${term.layer}</td>
      <td>${term.tokens_edited} of ${term.tokens_seen} (${share(term)} %)</td>
      <td>${signed(term.projection_before)}${!reads && html` → <b>${signed(term.projection_after)}</b>`}</td>
      <td>${term.perturbation?.toFixed(2) ?? "–"}</td>
    </tr>`)}</tbody>
  </table>`;
}
