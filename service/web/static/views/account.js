/** Tokens and spending: the caller's own, and for administrators everyone's, with policies and the audit log. */

import { ask, askAll, query } from "../api.js";
import { html, useEffect, useState } from "../lib.js";
import { Question } from "../parts/question.js";
import { Meter, Notice, NumberHeads, Scroll, Sheet } from "../parts/small.js";
import { usePolled } from "../polling.js";
import { dollars, moment, now, plural, when } from "../words.js";

const REFRESH_SECONDS = 30;
const MONTHS = 6;
const PER_PAGE = 20;
const POLICY = [["resources", "Pools"], ["prices", "Prices per hour"], ["highest_priority", "Highest priority"], ["queued_runs", "Queued runs"],
  ["active_runs", "Active runs"], ["dollars_per_month", "Dollars per month"], ["disk_bytes", "Disk"], ["retention", "Retention"]];

/** @param {{identity: any}} props The signed-in caller. */
export function AccountView({ identity }) {
  const admin = identity.scopes.includes("admin");
  return html`
    <div class="heading">
      <div class="lead">
        <h1>${admin ? "Administration" : "Account"}</h1>
        <p class="soft small">${admin ? "Tokens and spending of everyone, policies, and the audit log." : "Your own tokens, and what was spent on your runs and in your projects."}</p>
      </div>
    </div>
    <div class="grid">
      <${Spending} />
      <${Tokens} admin=${admin} />
      ${admin && html`<${Policies} />`}
      ${admin && html`<${AuditLog} />`}
    </div>`;
}

function Spending() {
  const load = (fields) => (signal) => ask(`/v1/spending${query(fields)}`, { signal });
  const month = new Date().toISOString().slice(0, 7);
  const { value, problem } = usePolled(load({ group_by: "owner,project", month }), REFRESH_SECONDS, [month]);
  const { value: months } = usePolled(load({ group_by: "month" }), REFRESH_SECONDS, []);
  const rows = [...(value?.items ?? [])].sort((one, other) => other.dollars - one.dollars);
  const total = rows.reduce((sum, row) => sum + row.dollars, 0);
  const earlier = (months?.items ?? []).filter((row) => row.month !== month).slice(0, MONTHS);
  return html`
    <${Sheet} title="Spending" note=${`${month}: ${dollars(total)}`}>
      <${Notice} problem=${problem} />
      ${value && rows.length === 0 && html`<p class="soft small">Nothing was spent this month.</p>`}
      ${rows.length > 0 && html`
        <${Scroll} label="Spending">
          <table class="spent">
            <thead><tr><th scope="col">Owner</th><th scope="col">Project</th><${NumberHeads} titles=${["Dollars"]} /><td class="share"></td></tr></thead>
            <tbody>${rows.map((row) => html`
              <tr key=${`${row.owner} ${row.project}`}>
                <th scope="row">${row.owner}</th>
                <td>${row.project_name ?? "(deleted or not yours)"}</td>
                <td class="number">${dollars(row.dollars)}</td>
                <td class="share"><${Meter} share=${row.dollars / rows[0].dollars} tone="var(--accent)" /></td>
              </tr>`)}</tbody>
          </table>
        </${Scroll}>`}
      ${earlier.length > 0 && html`
        <p class="soft small">Earlier: ${earlier.map((row) => `${row.month} ${dollars(row.dollars)}`).join(", ")}.</p>`}
    </${Sheet}>`;
}

function Tokens({ admin }) {
  const [version, setVersion] = useState(0);
  const [asked, setAsked] = useState(null);
  const [refused, setRefused] = useState(null);
  const { value, problem } = usePolled((signal) => askAll("/v1/tokens", signal), null, [version]);
  const valid = (value ?? []).filter((token) => token.revoked === null && (token.expires === null || token.expires > now()));
  const others = (value?.length ?? 0) - valid.length;
  const answered = async (yes) => {
    setAsked(null);
    if (!yes) return;
    try {
      await ask(`/v1/tokens/${asked.id}`, { method: "DELETE" });
      setRefused(null);
    } catch (error) {
      setRefused(error);
    }
    setVersion(version + 1);
  };
  return html`
    <${Sheet} title="Tokens" note=${String(valid.length)}>
      <${Notice} problem=${refused ?? problem} />
      <${Scroll} label="Tokens">
        <table class="tokens">
          <thead><tr>
            <th scope="col">Name</th>${admin && html`<th scope="col">Owner</th>`}
            ${["Scope", "Expires", "Last used"].map((title) => html`<th key=${title} scope="col">${title}</th>`)}
            <th scope="col"><span class="unseen">Actions</span></th>
          </tr></thead>
          <tbody>${valid.map((token) => html`
            <tr key=${token.id}>
              <th scope="row">${token.name}</th>
              ${admin && html`<td>${token.owner}</td>`}
              <td>${token.scopes.join(", ")}</td>
              <td>${token.expires === null ? "never" : moment(token.expires).split(",")[0]}</td>
              <td class="soft">${token.used === null ? "never" : when(token.used, now())}</td>
              <td><button onClick=${() => setAsked(token)}>Revoke<span class="unseen"> ${token.name}</span></button></td>
            </tr>`)}</tbody>
        </table>
      </${Scroll}>
      <p class="soft small">
        ${others > 0 ? `${plural(others, "revoked or expired token")} not shown. ` : ""}
        A browser makes no tokens: <code>moedisco tokens create NAME</code> does.
      </p>
      ${asked && html`
        <${Question} title=${`Revoke the token ${asked.name}${admin ? ` of ${asked.owner}` : ""}?`} yes="Revoke" danger answer=${answered}>
          <p>Programs and browsers that use it are signed out at once.</p>
        </${Question}>`}
    </${Sheet}>`;
}

function Policies() {
  const { value, problem } = usePolled((signal) => ask("/v1/policies", { signal }), REFRESH_SECONDS, []);
  const owners = Object.entries({ "everyone else": value?.default ?? {}, ...value?.owners });
  const shown = POLICY.filter(([field]) => owners.some(([, policy]) => field in policy));
  return html`
    <${Sheet} title="Policies">
      <${Notice} problem=${problem} />
      ${value && shown.length === 0 && html`<p class="soft small">No limits are set.</p>`}
      ${shown.length > 0 && html`
        <${Scroll} label="Policies">
          <table>
            <thead><tr><th scope="col">Owner</th>${shown.map(([field, title]) => html`<th key=${field} scope="col">${title}</th>`)}</tr></thead>
            <tbody>${owners.map(([owner, policy]) => html`
              <tr key=${owner}><th scope="row">${owner}</th>${shown.map(([field]) => html`<td key=${field}>${limitWords(policy[field])}</td>`)}</tr>`)}</tbody>
          </table>
        </${Scroll}>`}
      <p class="soft small">An empty field takes the value of <em>everyone else</em>. <code>moedisco policies set</code> changes them.</p>
    </${Sheet}>`;
}

/** A limit of a policy; an absent one is that of the default policy. */
function limitWords(limit) {
  if (limit === undefined) return "";
  if (limit === null) return "any";
  if (Array.isArray(limit)) return limit.join(", ") || "none";
  if (typeof limit === "object") return Object.entries(limit).map(([name, value]) => `${name} ${value}`).join(", ");
  return String(limit);
}

function AuditLog() {
  const [entries, setEntries] = useState([]);
  const [next, setNext] = useState(null);
  const [problem, setProblem] = useState(null);
  const load = async (cursor) => {
    try {
      const page = await ask(`/v1/audit${query({ limit: PER_PAGE, cursor })}`);
      setEntries((before) => (cursor ? [...before, ...page.items] : page.items));
      setNext(page.next_cursor);
    } catch (error) {
      setProblem(error);
    }
  };
  useEffect(() => {
    load(null);
  }, []);
  return html`
    <${Sheet} title="Audit log">
      <${Notice} problem=${problem} />
      <${Scroll} label="Audit log">
        <table class="audit">
          <thead><tr>${["Time", "Who", "Action", "Of", "Detail"].map((title) => html`<th key=${title} scope="col">${title}</th>`)}</tr></thead>
          <tbody>${entries.map((entry) => html`
            <tr key=${entry.id}>
              <td>${moment(entry.time)}</td>
              <td>${entry.owner}</td>
              <td><code>${entry.action}</code></td>
              <td>${entry.action.startsWith("run.") && entry.action !== "run.delete"
                ? html`<a href=${`#/runs/${entry.target}`}>${entry.target}</a>`
                : entry.target}</td>
              <td class="soft">${detailWords(entry.detail)}</td>
            </tr>`)}</tbody>
        </table>
      </${Scroll}>
      ${next && html`<p><button onClick=${() => load(next)}>Older entries</button></p>`}
    </${Sheet}>`;
}

const detailWords = (detail) =>
  Object.entries(detail).map(([name, value]) => `${name} ${typeof value === "string" ? value : JSON.stringify(value)}`).join(", ");
