/** What a project holds that no one can read again: secrets of its runs, and the URL that gets notices about their ends. */

import { ask } from "../api.js";
import { html, useEffect, useState } from "../lib.js";
import { now, when } from "../words.js";
import { Question } from "./question.js";
import { Notice } from "./small.js";

/** Loaded once it is opened: a page of projects asks for none of it. @param {{project: any}} props */
export function Secrets({ project }) {
  const [open, setOpen] = useState(false);
  return html`
    <details class="secrets" onToggle=${(event) => setOpen(event.target.open)}>
      <summary>Secrets and notices<span class="unseen"> of ${project.name}</span></summary>
      ${open && html`<${Opened} project=${project} />`}
    </details>`;
}

function Opened({ project }) {
  const [found, setFound] = useState({ secrets: [], url: null });
  const [problem, setProblem] = useState(null);
  const [said, setSaid] = useState("");
  const [leaving, setLeaving] = useState(null);
  const home = `/v1/projects/${project.id}`;
  const load = async () => setFound({ secrets: (await ask(`${home}/secrets`)).items, url: await noticeUrl(home) });
  const attempt = async (done, words) => {
    try {
      await done();
      setProblem(null);
      setSaid(words);
      return true;
    } catch (error) {
      setProblem(error);
      setSaid("");
      return false;
    }
  };
  const change = (path, method, body, words) => attempt(async () => {
    await ask(`${home}${path}`, { method, body });
    await load();
  }, words);
  useEffect(() => void attempt(load, ""), [project.id]);
  const answered = (yes) => {
    if (yes) change(leaving.path, "DELETE", undefined, `${leaving.name} was deleted.`);
    setLeaving(null);
  };
  const edits = project.role !== "viewer";
  return html`
    <${Notice} problem=${problem} />
    <p class="unseen" role="status">${said}</p>
    <p class="soft small">A run that names a secret in <code>secrets</code> gets it as an environment variable. No one can read its value again.</p>
    <ul class="small">${found.secrets.map((each) => html`
      <li key=${each.name}>
        <code>${each.name}</code> <span class="soft">set by ${each.set_by}, ${when(each.updated, now())}</span>
        ${edits && html`<${Delete} name=${each.name} ask=${() => setLeaving({ name: each.name, path: `/secrets/${each.name}` })} />`}
      </li>`)}</ul>
    ${edits && html`<${SecretForm} id=${project.id}
      send=${(name, value) => change(`/secrets/${encodeURIComponent(name)}`, "PUT", { value }, `${name} was set.`)} />`}
    <p class="soft small">${found.url
      ? html`Notices about ends of runs go to <b>${found.url.shown}</b>, set by ${found.url.set_by}. ${outcome(found.url)}`
      : "No URL gets notices about ends of runs."}</p>
    ${edits && html`<${UrlForm} id=${project.id} send=${(url) => change("/notices", "PUT", { url }, "The URL was set.")}>
      ${found.url && html`
        <button type="button" onClick=${() => change("/notices/test", "POST", undefined, "The test was accepted.")}>Test</button>
        <${Delete} name="the URL for notices" ask=${() => setLeaving({ name: "The URL for notices", path: "/notices" })} />`}
    </${UrlForm}>`}
    ${leaving && html`
      <${Question} title=${`Delete ${leaving.name}?`} yes="Delete" danger answer=${answered}>
        <p>Runs under way keep what they have.</p>
      </${Question}>`}`;
}

const outcome = ({ sent, failure }) => {
  if (failure) return `The last one was not accepted: ${failure}`;
  return sent ? `The last one was accepted ${when(sent, now())}.` : "";
};

async function noticeUrl(home) {
  try {
    return await ask(`${home}/notices`);
  } catch (error) {
    if (error.status === 404) return null;
    throw error;
  }
}

const Delete = ({ name, ask: asked }) => html`
  <button type="button" onClick=${asked}>Delete<span class="unseen"> ${name}</span></button>`;

/** @param {{id: string, send: (name: string, value: string) => Promise<boolean>}} props */
function SecretForm({ id, send }) {
  const [name, setName] = useState("");
  const [value, setValue] = useState("");
  const submit = async (event) => {
    event.preventDefault();
    const sent = value;
    setValue("");
    if (await send(name.trim(), sent)) setName("");
  };
  return html`
    <form class="name-form" onSubmit=${submit}>
      <div class="field">
        <label for=${`secret-${id}`}>Secret</label>
        <input id=${`secret-${id}`} required maxlength="64" autocomplete="off" spellcheck="false" placeholder="HF_TOKEN"
          value=${name} onInput=${(event) => setName(event.target.value)} />
      </div>
      <div class="field">
        <label for=${`value-${id}`}>Value</label>
        <input id=${`value-${id}`} type="password" required autocomplete="off" value=${value} onInput=${(event) => setValue(event.target.value)} />
      </div>
      <button disabled=${!name.trim() || !value}>Set</button>
    </form>`;
}

/** @param {{id: string, send: (url: string) => Promise<boolean>, children: unknown}} props */
function UrlForm({ id, send, children }) {
  const [url, setUrl] = useState("");
  const submit = async (event) => {
    event.preventDefault();
    const sent = url;
    setUrl("");
    await send(sent.trim());
  };
  return html`
    <form class="name-form" onSubmit=${submit}>
      <div class="field">
        <label for=${`notices-${id}`}>URL for notices</label>
        <input id=${`notices-${id}`} type="password" required autocomplete="off" aria-describedby=${`notices-${id}-hint`}
          value=${url} onInput=${(event) => setUrl(event.target.value)} />
        <span class="hint" id=${`notices-${id}-hint`}>https://, slack:// or another of apprise</span>
      </div>
      <button disabled=${!url.trim()}>Set</button>
      ${children}
    </form>`;
}
