/** Form for a new run or a retry: configuration, estimate, and submission. */

import { ask, askText, newKey } from "../api.js";
import { html, useEffect, useMemo, useRef, useState } from "../lib.js";
import { projectName, useProjects } from "../parts/projects.js";
import { Question } from "../parts/question.js";
import { Choices, Notice, Sheet } from "../parts/small.js";
import { go } from "../router.js";
import { Editor } from "../submit/editor.js";
import { Estimate, ofNewRun, useEstimate } from "../submit/estimate.js";
import { Quota, useQuota } from "../submit/quota.js";
import { changesBetween, parse, place, withChanges, write } from "../submit/yaml.js";

const PRESETS = [["demo", "demo"], ["default", "default"], ["paper", "paper"]];
/** Runs from which a retry takes the stages that it would make alike. */
const REUSE = [["auto", "this run and others that the same people see"], ["parent", "this run only"], ["never", "no run"]];

export function SubmitView() {
  const [preset, setPreset] = useState("demo");
  const [wanted, setWanted] = useState(null);
  const [start, setStart] = useState("");
  const [text, setText] = useState("");
  const [problem, setProblem] = useState(null);
  const load = async (name) => {
    setPreset(name);
    try {
      const loaded = await askText(`/v1/presets/${name}`);
      setStart(loaded);
      setText(loaded);
    } catch (error) {
      setProblem(error);
    }
  };
  useEffect(() => {
    load("demo");
  }, []);
  const choose = (name) => (text === start ? load(name) : setWanted(name));
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
    <${RunForm} title="New run" verb="Submit" text=${text} setText=${setText} send=${send} requestOf=${ofNewRun} problem=${problem}
      project=${project} place=${projects.length > 1 && html`<${ProjectField} projects=${projects} value=${project} choose=${setProject} />`}
      tools=${html`<${Choices} label="Preset" options=${PRESETS} value=${preset} choose=${choose} />`} />
    ${wanted && html`
      <${Question} title="Replace your changes?" yes="Replace" answer=${answered}>
        <p>The preset ${wanted} replaces the text in the editor.</p>
      </${Question}>`}`;
}

/** @param {{id: string, changes: Record<string, any>}} props Id of the run to retry, and settings to begin with, by dotted path. */
export function RetryView({ id, changes }) {
  const [run, setRun] = useState(null);
  const [before, setBefore] = useState(null);
  const [text, setText] = useState("");
  const [problem, setProblem] = useState(null);
  useEffect(() => {
    const load = async () => {
      try {
        const found = await ask(`/v1/runs/${id}`);
        // The service puts the retry beside the run. Tags may have changed since the run was submitted.
        const { output, ...others } = found.config;
        const config = { ...others, tags: found.tags };
        setRun(found);
        setBefore(config);
        setText(write(withChanges(config, changes)));
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
      text=${text} setText=${setText} send=${send} requestOf=${requestOf} problem=${problem} reuses
      priority=${run?.priority} budget=${run?.money.budget_dollars} tools=${null} />`;
}

/**
 * @param {{title: string, verb: string, text: string, setText: (text: string) => void, tools: unknown, problem: Error | null,
 *   priority?: number, budget?: number | null, reuses?: boolean,
 *   requestOf: (config: any, reuse: string) => {path: string, body: any},
 *   send: (request: {config: any, priority: number, budget: number | null, reuse: string, key: string}) => Promise<any>}} props
 *   `reuses`: whether stages of other runs can be taken. `project`, `place`: what the request says of the project, and the field for it.
 */
function RunForm({ title, verb, text, setText, tools, send, requestOf, reuses = false, project = "", place: where = null, problem: earlier, ...first }) {
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
    <${Notice} problem=${earlier ?? (mistakes.length ? null : said)} />
    <form class="submit" onSubmit=${submit}>
      <${Sheet} title="Configuration" tools=${tools}>
        <${Editor} label="Configuration, YAML" text=${text} change=${setText} mistakes=${mistakes} />
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
