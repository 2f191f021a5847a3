// The form's values -> a request body, and the same request as text to copy.

const TOP_ALTERNATIVES = 5;

export function labelsOf(text, space) {
  return text.split("\n").map((line) => line.trim()).filter(Boolean).map((label) => (space ? ` ${label}` : label));
}

// Values: {endpoint, model, prompt, mode, k, labels, tau, temperature, maxTokens, threshold, posteriorSeed, tokenSeed, returnSamples};
// null stands for the server's default. K = 0 is a plain request, which the mean answers.
export function buildRequest(values) {
  const chat = values.endpoint === "chat";
  const body = {
    model: values.model,
    ...(chat ? { messages: [{ role: "user", content: values.prompt }] } : { prompt: values.prompt }),
    max_tokens: values.maxTokens,
    temperature: values.temperature,
    ...(values.tokenSeed === null ? {} : { seed: values.tokenSeed }),
    stream: true,
    stream_options: { include_usage: true },
  };
  const writes = values.mode === "ensemble" || values.mode === "score";
  if (writes) Object.assign(body, chat ? { logprobs: true, top_logprobs: TOP_ALTERNATIVES } : { logprobs: TOP_ALTERNATIVES });
  if (values.k > 0) {
    const options = { mode: values.mode, n_samples: values.k };
    const given = { tau: values.tau, threshold: values.threshold, seed: values.posteriorSeed };
    for (const [name, value] of Object.entries(given)) if (value !== null) options[name] = value;
    if (values.mode === "choices") options.choices = values.labels;
    else options.granularity = "token";
    if (values.returnSamples) options.return_samples = true;
    body.uncertainty = options;
  }
  return { path: chat ? "v1/chat/completions" : "v1/completions", body };
}

const shellQuoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

// The key is named, never written.
export function asCurl(url, body, withKey) {
  const lines = [`curl -N ${shellQuoted(url)}`, "-H 'Content-Type: application/json'"];
  if (withKey) lines.push('-H "Authorization: Bearer $CREDENCE_API_KEY"');
  return [...lines, `-d ${shellQuoted(JSON.stringify(body))}`].join(" \\\n  ");
}

function python(value, indent) {
  const inner = `${indent}    `;
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map((item) => python(item, indent)).join(", ")}]`;
  if (typeof value === "object") {
    const entries = Object.entries(value).map(([name, item]) => `${inner}${JSON.stringify(name)}: ${python(item, inner)},`);
    return `{\n${entries.join("\n")}\n${indent}}`;
  }
  return JSON.stringify(value);
}

export function asPython(base, path, body, withKey) {
  const { uncertainty, ...standard } = body;
  const chat = path.includes("chat");
  const fields = Object.entries(standard).map(([name, value]) => `    ${name}=${python(value, "    ")},`);
  if (uncertainty) fields.push(`    extra_body=${python({ uncertainty }, "    ")},`);
  return [
    ...(withKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(`${base}v1`)}, api_key=${withKey ? 'os.environ["CREDENCE_API_KEY"]' : '"none"'})`,
    `stream = client.${chat ? "chat.completions" : "completions"}.create(`,
    ...fields,
    ")",
    "for chunk in stream:",
    "    for choice in chunk.choices:",
    `        print(${chat ? 'choice.delta.content or ""' : "choice.text"}, end="", flush=True)`,
    ...(uncertainty ? ['        print(getattr(choice, "uncertainty", None) or "")'] : []),
    "",
  ].join("\n");
}
