/** The direction's calibration: both classes as normal curves, the boundary, and where the answers' tokens lie. */
import { html, useEffect, useRef, useState } from "./vendor/htm-preact.js";
import { marked, reading, separations, signed } from "./answers.js";

const TOP = 18, CURVE = 84, ROW = 32, LEFT = 78, RIGHT = 26; // pixels
const FAR = 3; // class separations; what lies beyond is drawn at the edge

export function Chart({ plan, rows, active }) {
  const [box, width] = useWidth();
  const layer = plan?.calibration?.layers.find((item) => item.layer === plan.layer);
  if (!layer) return html`<div ref=${box} class="quiet">No calibration to show: nothing is read along a direction.</div>`;
  const classes = classesOf(layer);
  const ends = classes.flatMap(({ mean, sigma }) => [mean - 3.2 * sigma, mean + 3.2 * sigma]);
  const [low, high] = [Math.min(-FAR, ...ends), Math.max(FAR, ...ends)];
  const inside = (z) => Math.max(low, Math.min(high, z));
  const x = (z) => LEFT + ((inside(z) - low) / (high - low)) * (width - LEFT - RIGHT);
  const base = TOP + CURVE;
  const height = base + 24 + ROW * rows.length;
  const ticks = Array.from({ length: Math.floor(high) - Math.ceil(low) + 1 }, (_, index) => Math.ceil(low) + index);
  const told = (tick) => `${tick === low ? "≤ " : tick === high ? "≥ " : ""}${tick ? signed(tick, 0) : "0"}`;
  return html`<div ref=${box}><svg class="chart" width=${width} height=${height} role="img" aria-label=${summary(rows, plan)}>
    ${classes.map((one) => html`<${Curve} ...${one} text=${plan.poles[one.name]} x=${x} base=${base} />`)}
    <line class="axis" x1=${LEFT} x2=${width - RIGHT} y1=${base} y2=${base} />
    ${ticks.map((tick) => html`<g class="tick">
      <line x1=${x(tick)} x2=${x(tick)} y1=${base} y2=${base + 4} />
      <text x=${x(tick)} y=${base + 15}>${told(tick)}</text></g>`)}
    <line class="boundary" x1=${x(0)} x2=${x(0)} y1=${TOP - 6} y2=${height - 4} />
    <text x=${x(0)} y=${TOP - 8} text-anchor="middle">boundary</text>
    ${rows.map((row, index) => html`<${Rug} ...${row} x=${x} y=${base + 33 + ROW * index} active=${active}
      beyond=${(z) => inside(z) !== z} />`)}
  </svg></div>`;
}

/** Mean and deviation of both classes in class separations from the boundary; `peak` is relative to the higher one. */
function classesOf(layer) {
  const unit = layer.mu_aligned - layer.mu_violating;
  const narrow = Math.min(layer.sigma_aligned, layer.sigma_violating);
  return ["violating", "aligned"].map((name) => {
    const [mean, sigma] = [layer[`mu_${name}`], layer[`sigma_${name}`]];
    return { name, mean: (mean - layer.boundary) / unit, sigma: Math.abs(sigma / unit), peak: sigma ? narrow / sigma : 1 };
  });
}

function Curve({ name, mean, sigma, peak, text, x, base }) {
  const tall = CURVE * 0.86 * peak;
  const points = Array.from({ length: 65 }, (_, index) => index / 8 - 4)
    .map((step) => `${x(mean + step * sigma).toFixed(1)} ${(base - tall * Math.exp(-(step ** 2) / 2)).toFixed(1)}`);
  const right = name === "aligned";
  return html`<path class="curve ${name}" d="M${points.join("L")}Z" />
    <text class="pole ${name}" x=${x(mean) + (right ? 6 : -6)} y=${base - tall - 5} text-anchor=${right ? "start" : "end"}>${text}</text>`;
}

/** One answer's tokens, and how the receipt's mean was moved. */
function Rug({ name, answer, plan, reads, x, y, active, beyond }) {
  const term = answer.steering?.receipts[0]?.terms[plan.view];
  const [from, to] = [term?.projection_before, term?.projection_after].map((value) => separations(value, plan));
  const dot = (part, index) => {
    const z = reading(part, plan);
    return Number.isFinite(z) && html`<circle cx=${x(z)} cy=${y + (((index * 5) % 7) - 3) * 2}
      r=${active?.name === name && active.at === index ? 7 : 3.5} data-side=${z < 0 ? "violating" : "aligned"}
      data-mark=${marked(part) && !reads ? "edited" : ""} data-beyond=${beyond(z)} />`;
  };
  return html`<g class="rug">
    <text x="0" y=${y + 4}>${name}</text>
    ${answer.parts.map(dot)}
    ${!reads && Number.isFinite(from) && Number.isFinite(to) && html`<g class="move">
      <line x1=${x(from)} x2=${x(to)} y1=${y + 13} y2=${y + 13} />
      <path d="M${x(to)} ${y + 13}l${to < from ? "8 -5v10z" : "-8 -5v10z"}" /></g>`}
  </g>`;
}

function summary(rows, plan) {
  const parts = rows.map(({ name, answer, plan: own }) => {
    const below = answer.parts.filter((part) => reading(part, own) < 0).length;
    return `${name}: ${below} of ${answer.parts.length} tokens on the ${plan.poles.violating} side.`;
  });
  return `Calibration at layer ${plan.layer}, in class separations from the boundary. ${parts.join(" ")}`;
}

function useWidth() {
  const box = useRef(null);
  const [width, setWidth] = useState(320);
  useEffect(() => {
    const observer = new ResizeObserver(([entry]) => setWidth(Math.max(260, Math.floor(entry.contentRect.width))));
    observer.observe(box.current);
    return () => observer.disconnect();
  }, []);
  return [box, width];
}
