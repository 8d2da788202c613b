/** Form for a new run or a retry: configuration, estimate, and submission. */

import { ask, askText, newKey, query } from "../api.js";
import { html, useEffect, useMemo, useRef, useState } from "../lib.js";
import { projectName, useProjects } from "../parts/projects.js";
import { Question } from "../parts/question.js";
import { Choices, Notice, Sheet } from "../parts/small.js";
import { go } from "../router.js";
import { Editor } from "../submit/editor.js";
import { Estimate, ofNewRun, useEstimate } from "../submit/estimate.js";
import { Quota, useQuota } from "../submit/quota.js";
import { changesBetween, parse, place, withChanges, write } from "../submit/yaml.js";
import { decimal, dollars } from "../words.js";

const PRESETS = [["demo", "embedded text, minutes on CPUs"], ["default", "own text, on the cards that cost least"],
  ["paper", "sub-models on clusters, then a short fine-tune"]];
const TEMPLATE = "template:yes";
const LINES = [["all", "all lines"], ["changed", "changes only"]];
/** Runs from which a retry takes the stages that it would make alike. */
const REUSE = [["auto", "this run and others that the same people see"], ["parent", "this run only"], ["never", "no run"]];

/** @param {{from: string | null}} props `from`: id of a run to copy. */
export function SubmitView({ from }) {
  const [source, setSource] = useState(from ?? "demo");
  const [wanted, setWanted] = useState(null);
  const [start, setStart] = useState({ text: "" });
  const [text, setText] = useState("");
  const [problem, setProblem] = useState(null);
  const [templates, setTemplates] = useState([]);
  const load = async (name) => {
    setSource(name);
    try {
      const loaded = isPreset(name) ? await askText(`/v1/presets/${name}`) : write((await configOf(name)).config);
      setStart({ text: loaded });
      setText(loaded);
      setProblem(null);
    } catch (error) {
      setProblem(error);
    }
  };
  useEffect(() => {
    load(source);
    ask("/v1/runs" + query({ tag: TEMPLATE, limit: 12 })).then(({ items }) => setTemplates(items), () => {});
  }, []);
  const choose = (name) => (text === start.text ? load(name) : setWanted(name));
  const answered = (yes) => {
    if (yes) load(wanted);
    setWanted(null);
  };
  const projects = useProjects().filter((each) => each.role !== "viewer");
  const [project, setProject] = useState("");
  const send = ({ config, priority, budget, key }) =>
    ask("/v1/runs", {
      method: "POST",
      body: { config, priority, budget_dollars: budget, project: project || null },
      headers: { "Idempotency-Key": key },
    });
  return html`
    <${RunForm} title="New run" verb="Submit" start=${start} text=${text} setText=${setText} send=${send} requestOf=${ofNewRun} problem=${problem}
      project=${project} place=${projects.length > 1 && html`<${ProjectField} projects=${projects} value=${project} choose=${setProject} />`}
      above=${html`<${Starts} templates=${templates} value=${source} choose=${choose} />`} />
    ${wanted && html`
      <${Question} title="Replace your changes?" yes="Replace" answer=${answered}>
        <p>Another start replaces the text in the editor.</p>
      </${Question}>`}`;
}

const isPreset = (name) => PRESETS.some(([preset]) => preset === name);

/** A run with the configuration for another one: without its place, which the service chooses, and with its present tags. */
async function configOf(id) {
  const run = await ask(`/v1/runs/${id}`);
  const { output, ...others } = run.config;
  const { template, ...tags } = run.tags;
  return { run, config: { ...others, tags } };
}

/** Presets and runs that are marked as templates, to begin with. */
const Starts = ({ templates, value, choose }) => html`
  <div class="starts" role="group" aria-label="Start from">
    ${PRESETS.map(([name, words]) => html`<${Start} key=${name} name=${name} words=${words} chosen=${value === name} choose=${() => choose(name)} />`)}
    ${templates.map((run) => html`
      <${Start} key=${run.id} name=${run.name} words=${templateWords(run)} chosen=${value === run.id} choose=${() => choose(run.id)} />`)}
  </div>`;

const Start = ({ name, words, chosen, choose }) => html`
  <button type="button" aria-pressed=${String(chosen)} onClick=${choose}><strong>${name}</strong> <span>${words}</span></button>`;

function templateWords({ owner, results, money, note }) {
  const perplexity = results.perplexity === null ? null : `perplexity ${decimal(results.perplexity, 2)}`;
  return [`by ${owner}`, perplexity, dollars(money.dollars), note?.split("\n")[0]].filter(Boolean).join(", ");
}

/** @param {{id: string, changes: Record<string, any>}} props Id of the run to retry, and settings to begin with, by dotted path. */
export function RetryView({ id, changes }) {
  const [run, setRun] = useState(null);
  const [before, setBefore] = useState(null);
  const [start, setStart] = useState({ text: "" });
  const [text, setText] = useState("");
  const [problem, setProblem] = useState(null);
  useEffect(() => {
    const load = async () => {
      try {
        const { run: found, config } = await configOf(id);
        setRun(found);
        setBefore({ ...config, tags: found.tags });
        const begin = write(withChanges(config, changes));
        setStart({ text: begin });
        setText(begin);
      } catch (error) {
        setProblem(error);
      }
    };
    load();
  }, []);
  const send = ({ config, priority, budget, reuse, key }) =>
    ask(`/v1/runs/${id}/retry`, {
      method: "POST",
      body: { changes: changesBetween(before, config), priority, budget_dollars: budget, reuse },
      headers: { "Idempotency-Key": key },
    });
  const requestOf = (config, reuse) => {
    try {
      return { path: `/v1/runs/${id}/retry/estimate`, body: { changes: changesBetween(before, config), reuse } };
    } catch {
      return ofNewRun(config); // what cannot be changed in a retry is said when it is submitted
    }
  };
  return html`
    <${RunForm} key=${run?.id} title=${run ? `Retry ${run.name}` : "Retry"} verb="Submit the retry"
      start=${start} text=${text} setText=${setText} send=${send} requestOf=${requestOf} problem=${problem} reuses
      priority=${run?.priority} budget=${run?.money.budget_dollars} earlier=${before && write(before)} />`;
}

/**
 * @param {{title: string, verb: string, start: {text: string}, text: string, setText: (text: string) => void, above?: unknown, problem: Error | null, earlier?: string | null,
 *   priority?: number, budget?: number | null, reuses?: boolean,
 *   requestOf: (config: any, reuse: string) => {path: string, body: any},
 *   send: (request: {config: any, priority: number, budget: number | null, reuse: string, key: string}) => Promise<any>}} props
 *   `above`: what stands above the form. `earlier`: text whose differences are marked. `reuses`: whether stages of other runs can be taken. `project`, `place`: what the request says of the project, and the field for it.
 */
function RunForm(props) {
  const { title, verb, start, text, setText, send, requestOf, above = null, earlier = null, reuses = false, project = "", place: where = null, ...first } = props;
  const [folded, setFolded] = useState(earlier !== null && earlier !== start.text);
  const [priority, setPriority] = useState(String(first.priority ?? 0));
  const [budget, setBudget] = useState(String(first.budget ?? ""));
  const [reuse, setReuse] = useState("auto");
  const [busy, setBusy] = useState(false);
  const [refused, setRefused] = useState(null);
  const key = useRef(newKey());
  const parsed = useMemo(() => (text.trim() ? parse(text) : { config: null, mistakes: [] }), [text]);
  const quota = useQuota();
  const { plan, problem: doubt, busy: estimating } = useEstimate(parsed.config, `${reuse}\n${text}`, (config) => requestOf(config, reuse));
  useEffect(() => {
    // A different request needs a new key; with the old one, the service would return the earlier run
    key.current = newKey();
    setRefused(null);
  }, [text, priority, budget, reuse, project]);
  const said = refused ?? (estimating ? null : doubt);
  const mistakes = [...parsed.mistakes, ...(parsed.config && said?.mistakes ? place(text, said.mistakes) : [])];
  const ready = parsed.config !== null && !estimating && doubt === null && plan !== null;
  const submit = async (event) => {
    event.preventDefault();
    if (!ready || busy) return;
    setBusy(true);
    try {
      const terms = { priority: Number(priority || 0), budget: budget === "" ? null : Number(budget), reuse };
      const run = await send({ config: parsed.config, key: key.current, ...terms });
      go(`/runs/${run.id}`);
    } catch (error) {
      setRefused(error);
      setBusy(false);
    }
  };
  return html`
    <div class="heading"><div class="lead"><h1>${title}</h1></div></div>
    <${Notice} problem=${first.problem ?? (mistakes.length ? null : said)} />
    ${above}
    <form class="submit" onSubmit=${submit}>
      <${Sheet} title="Configuration" tools=${earlier !== null && html`
        <${Choices} label="Lines" options=${LINES} value=${folded ? "changed" : "all"} choose=${(lines) => setFolded(lines === "changed")} />`}>
        <${Editor} label="Configuration, YAML" start=${start} change=${setText} mistakes=${mistakes} before=${earlier} folded=${folded} />
      </${Sheet}>
      <${Estimate} plan=${plan} stale=${estimating || doubt !== null || parsed.config === null} />
      <${Sheet} title="Queue and budget">
        <div class="terms-form">
          ${where}
          ${reuses && html`
            <div class="field whole">
              <label for="reuse">Take finished stages of</label>
              <select id="reuse" aria-describedby="reuse-hint" value=${reuse} onChange=${(event) => setReuse(event.target.value)}>
                ${REUSE.map(([key, words]) => html`<option key=${key} value=${key}>${words}</option>`)}
              </select>
              <span class="hint" id="reuse-hint">where the retry would make them alike</span>
            </div>`}
          <${NumberField} id="priority" label="Priority" hint=${`−100 to ${quota?.highest_priority ?? 100}; higher starts first`}
            value=${priority} change=${setPriority} min="-100" max=${quota?.highest_priority ?? 100} step="1" />
          <${NumberField} id="budget" label="Budget, dollars" hint="the run stops with a checkpoint when it is spent"
            value=${budget} change=${setBudget} min="0.0001" step="any" placeholder="none" />
          <button class="primary" disabled=${!ready || busy}>${busy ? "Submitting…" : verb}</button>
        </div>
        <${Quota} quota=${quota} />
      </${Sheet}>
    </form>`;
}

const ProjectField = ({ projects, value, choose }) => html`
  <div class="field whole">
    <label for="project">Project</label>
    <select id="project" aria-describedby="project-hint" value=${value} onChange=${(event) => choose(event.target.value)}>
      <option value="">your own</option>
      ${projects.map((each) => html`<option key=${each.id} value=${each.id}>${projectName(each)}</option>`)}
    </select>
    <span class="hint" id="project-hint">its members see the run; editors may change it</span>
  </div>`;

/**
 * @param {{id: string, label: string, hint: string, value: string, change: (value: string) => void}} props
 *   Other properties are attributes of the input.
 */
const NumberField = ({ id, label, hint, value, change, ...rest }) => html`
  <div class="field">
    <label for=${id}>${label}</label>
    <input
      id=${id} type="number" aria-describedby=${`${id}-hint`} ...${rest}
      value=${value} onInput=${(event) => change(event.target.value)}
    />
    <span class="hint" id=${`${id}-hint`}>${hint}</span>
  </div>`;
