/** From the form to the requests that the page sends, and to the same request as Python and curl. */
import { EXAMPLES, NO_EXAMPLES } from "./examples.js";

/** The form's first state: own steering where requests may, as the default policy does it; else that policy. */
export function startForm(info) {
  const policy = info.policies.find((item) => item.name === info.default) ?? info.policies[0];
  const own = ownSteering(info, policy);
  const choice = info.requests === "open" && own ? "own" : policy ? `policy:${policy.name}` : "none";
  const form = { choice, own, strength: policy?.strength, view: 0, temperature: 0, seed: 0, max_tokens: 128 };
  const { attacks, prompts } = examplesOf(form, info);
  return { ...form, system: attacks[0] ?? "", prompt: prompts[0] ?? "" };
}

/** The form with some changes; ready texts of one concept give way to those of the next. */
export function changed(form, part, info) {
  const next = { ...form, ...part };
  const [old, now] = [examplesOf(form, info), examplesOf(next, info)];
  if (old === now || !now.prompts.length) return next;
  if (old.attacks.includes(form.system)) next.system = now.attacks[0];
  if (old.prompts.includes(form.prompt)) next.prompt = now.prompts[0];
  return next;
}

/** Ready texts for the concept that is steered. */
export const examplesOf = (form, info) => EXAMPLES[chosen(form, info)?.calibration?.concept] ?? NO_EXAMPLES;

/** An own steering that starts where a policy is, or where a direction separates its classes best. */
export function ownSteering(info, policy) {
  const direction = info.directions.find((item) => item.name === policy?.direction) ?? info.directions[0];
  if (!direction) return null;
  const best = direction.layers.reduce((a, b) => ((b.cohens_d ?? 0) > (a.cohens_d ?? 0) ? b : a));
  const { method = "sttp", layers = [best.layer], position = "all", toward = "aligned", gate } = policy ?? {};
  const strength = policy?.strength ?? middle(gridOf(info, method));
  return { direction: direction.name, method, layers: [...layers], strength, position, toward, gate };
}

export const middle = (grid) => grid[Math.floor(grid.length / 2)] ?? 1;
export const gridOf = (info, method) => info.methods.find((item) => item.name === method)?.strengths ?? [];
export const policyOf = (form, info) =>
  form.choice.startsWith("policy:") ? info.policies.find((item) => item.name === form.choice.slice(7)) : undefined;

/** What is chosen, a policy or an own steering, with its direction's calibration; undefined: no steering. */
export function chosen(form, info) {
  const policy = policyOf(form, info);
  const item = policy ?? (form.choice === "own" ? form.own : undefined);
  if (!item) return undefined;
  const direction = info.directions.find((one) => one.name === item.direction);
  const layers = [...item.layers].sort((a, b) => a - b);
  return { ...item, layers, policy, calibration: direction, strength: policy ? form.strength : item.strength };
}

/** Strengths that the slider offers: the method's grid, within a policy's bounds. */
export function strengths(form, info) {
  const item = chosen(form, info);
  if (!item) return [];
  const bounds = item.policy?.bounds;
  const grid = gridOf(info, item.method).filter((value) => !bounds || (value >= bounds[0] && value <= bounds[1]));
  return [...new Set([...grid, ...(bounds ?? []), item.strength])].sort((a, b) => a - b);
}

/** The request's `steering` field; undefined leaves it out, so that the server's default holds. */
export function steeringOf(form, info) {
  const item = chosen(form, info);
  if (!item) return info.requests === "open" ? [] : undefined;
  if (item.policy) {
    const moved = item.strength === item.policy.strength ? {} : { strength: item.strength };
    if (info.requests === "locked" && !("strength" in moved)) return undefined;
    return { policy: item.policy.name, ...moved };
  }
  const { direction, method, layers, strength, position, toward, gate } = item;
  return { direction, method, layers, strength, position, toward, ...(gate ? { gate } : {}) };
}

/** The request's body; the chosen steering, or with `watch` a steering that only reads the projections. */
export function bodyOf(form, info, watch) {
  const steering = watch ? watching(form, info) : steeringOf(form, info);
  const messages = [{ role: "user", content: form.prompt }];
  if (form.system.trim()) messages.unshift({ role: "system", content: form.system });
  return {
    model: info.served, messages, temperature: form.temperature, max_tokens: form.max_tokens,
    ...(form.temperature > 0 ? { seed: form.seed } : {}), ...(steering === undefined ? {} : { steering }),
  };
}

/** Whether the server lets this page show an unsteered answer: a defence need not allow it. */
export const comparable = (info) => info.requests === "open" || (info.requests === "policies" && !info.default);

function watching(form, info) {
  const item = chosen(form, info);
  if (info.requests !== "open") return undefined;
  if (!item?.calibration) return [];
  const { direction, layers, position } = item;
  return { direction, method: "monitor", layers, strength: 0, position };
}

/** The body as a program with the official openai client. The key is read from the environment, never copied. */
export function asPython(body, base, keyed) {
  const { steering, ...known } = body;
  const fields = Object.entries(known).map(([name, value]) => `    ${name}=${literal(value)},\n`).join("");
  const extra = steering === undefined ? "" : `    extra_body={"steering": ${literal(steering)}},\n`;
  const key = keyed ? 'os.environ["STEERWELL_API_KEY"]' : '"none"';
  return `${keyed ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url=${literal(base)}, api_key=${key})
answer = client.chat.completions.create(
${fields}${extra})
print(answer.choices[0].message.content)
print(answer.steering)  # the receipt
`;
}

export function asCurl(body, base, keyed) {
  const key = keyed ? ' \\\n  -H "Authorization: Bearer $STEERWELL_API_KEY"' : "";
  const data = JSON.stringify(body, null, 1).replaceAll("'", "'\\''");
  return `curl ${base}/chat/completions -H "Content-Type: application/json"${key} -d '${data}'\n`;
}

function literal(value) {
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (value === null || value === undefined) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([name, item]) => `${literal(name)}: ${literal(item)}`).join(", ")}}`;
}
