/** A run's name, state, facts and actions. */

import { ask, here } from "../api.js";
import { html, useState } from "../lib.js";
import { mayEdit, projectOf } from "../parts/projects.js";
import { Question } from "../parts/question.js";
import { Notice, Outside, StatePill } from "../parts/small.js";
import { useNow } from "../polling.js";
import { age, duration, moment, when } from "../words.js";
import { isTerminal } from "./live.js";

const CONSEQUENCES = {
  queued: "The run has not started; it leaves the queue.",
  running: "The run finishes its step, writes a checkpoint, and can be resumed later.",
  stopping: "The driver is ended within a minute, without a checkpoint; training since the last one is lost.",
};

/** @param {{run: any, acted: () => void}} props `acted`: called after an action that changes the run. */
export function RunHeader({ run, acted }) {
  const [asking, setAsking] = useState(false);
  const [force, setForce] = useState(false);
  const [problem, setProblem] = useState(null);
  const act = async (action, body) => send(`/${action}`, "POST", body);
  const keep = () => send("", "PATCH", { kept: !run.kept });
  const isTemplate = run.tags.template === "yes";
  const mark = () => send("", "PATCH", { tags: { template: isTemplate ? null : "yes" } });
  const send = async (path, method, body) => {
    setProblem(null);
    try {
      await ask(`/v1/runs/${run.id}${path}`, { method, body });
    } catch (error) {
      setProblem(error);
    }
    acted();
  };
  const answered = (yes) => {
    setAsking(false);
    if (yes) act("cancel", { force: force || stopping });
  };
  const ended = isTerminal(run.state);
  const stopping = run.state === "stopping";
  const verb = stopping ? "Kill" : "Cancel";
  const editable = mayEdit(run);
  const resumable = run.state === "failed" || run.state === "cancelled";
  return html`
    <div class="heading tall">
      <div class="lead">
        <h1>${run.name} <${StatePill} state=${run.state} /></h1>
        <${Facts} run=${run} />
      </div>
      <div class="actions">
        ${run.job_url && html`<${Outside} address=${pathOf(run.job_url)}>Ray job</${Outside}>`}
        ${run.parent && html`<a class="button" href=${`#/compare/${run.parent},${run.id}`}>Compare with the earlier run</a>`}
        <a class="button" href=${`#/submit?from=${run.id}`}>Copy</a>
        ${editable && html`<button aria-pressed=${String(isTemplate)} onClick=${mark}>Template</button>`}
        ${editable && html`<a class="button" href=${`#/runs/${run.id}/retry`}>Retry with changes</a>`}
        ${editable && resumable && html`<button class="primary" onClick=${() => act("resume")}>Resume</button>`}
        ${run.state === "succeeded" && html`
          <a class="button primary" href=${here(`/v1/runs/${run.id}/model.tar`)} download=${`${run.name}.tar`}>Download model</a>`}
        ${editable && ended && html`<button aria-pressed=${String(run.kept)} onClick=${keep}>${run.kept ? "Kept" : "Keep"}</button>`}
        ${editable && !ended && html`<button class="danger" onClick=${() => setAsking(true)}>${verb}</button>`}
      </div>
    </div>
    <${Notice} problem=${problem} />
    ${run.reason && run.state !== "failed" && html`<p class="notice warn">${reasonWords(run)}</p>`}
    ${run.notice && html`<p class="notice warn">This run: ${run.notice}.</p>`}
    ${run.expires_at !== null && html`
      <p class="notice warn">This run is removed with its files after ${moment(run.expires_at)}, unless you keep it.</p>`}
    ${asking && html`
      <${Question} title=${`${verb} ${run.name}?`} yes=${`${verb} the run`} danger answer=${answered}>
        <p>${CONSEQUENCES[run.state] ?? CONSEQUENCES.running}</p>
        ${run.state !== "queued" && !stopping && html`
          <label><input type="checkbox" checked=${force} onChange=${(event) => setForce(event.target.checked)} />
            End the driver within a minute, without a checkpoint; training since the last one is lost</label>`}
      </${Question}>`}`;
}

/** The path of one of the service's URLs, because browsers may reach the service under another host name. */
function pathOf(address) {
  const { pathname, hash } = new URL(address);
  return pathname + hash;
}

/** Owner, project, times, attempts, priority and tags. */
function Facts({ run }) {
  const now = useNow();
  const { seconds } = run.bill;     // without the time between attempts
  const timed = run.started !== null && run.state !== "queued" && seconds !== null;
  const parts = [
    run.owner,
    projectOf(run) && html`<a href="#/projects">${projectOf(run)}</a>`,
    html`<span title=${moment(run.created)}>created ${age(now - run.created)} ago</span>`,
    run.position !== null && `queued (#${run.position})`,
    run.forecast && `ends at about ${when(run.forecast.ends, now)}`,
    timed && `${run.ended === null ? "running for" : "took"} ${duration(seconds)}`,
    run.attempt > 1 && `attempt ${run.attempt}`,
    run.priority !== 0 && `priority ${run.priority}`,
    run.parent && html`<a href=${`#/runs/${run.parent}`}>retry of an earlier run</a>`,
    ...(run.reuses ?? []).map((found) => html`
      reuses ${found.stages.join(", ")} of <a href=${`#/runs/${found.run}`}>${found.name ?? "a deleted run"}</a>`),
    ...Object.entries(run.tags).map(([key, value]) => `${key}: ${value}`),
    html`<code>${run.id}</code>`,
  ];
  return html`<ul class="facts">${parts.filter(Boolean).map((part) => html`<li>${part}</li>`)}</ul>`;
}

const AFTERWARDS = {
  cancelled: "It can be resumed.",
  stopping: "The run finishes its step and writes a checkpoint.",
};

function reasonWords({ state, reason }) {
  const name = state[0].toUpperCase() + state.slice(1);
  return [reason === state ? name : `${name}: ${reason}`, AFTERWARDS[state]].filter(Boolean).join(". ");
}
