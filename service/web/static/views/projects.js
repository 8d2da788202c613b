/** Projects, their members, and data sets. */

import { ask, askAll } from "../api.js";
import { html, useState } from "../lib.js";
import { Datasets } from "../parts/datasets.js";
import { projectName } from "../parts/projects.js";
import { Question } from "../parts/question.js";
import { Secrets } from "../parts/secrets.js";
import { Notice, Sheet } from "../parts/small.js";
import { usePolled } from "../polling.js";

const ROLES = ["viewer", "editor"];

/** @param {{me: string}} props `me`: owner that the session acts for. */
export function ProjectsView({ me }) {
  const [version, setVersion] = useState(0);
  const { value, problem } = usePolled((signal) => askAll("/v1/projects", signal), null, [version]);
  const [refused, setRefused] = useState(null);
  const change = async (path, method, body) => {
    try {
      await ask(`/v1/projects${path}`, { method, body });
      setRefused(null);
      setVersion(version + 1);
      return true;
    } catch (error) {
      setRefused(error);
      return false;
    }
  };
  return html`
    <div class="heading">
      <div class="lead">
        <h1>Projects</h1>
        <p class="soft small">A viewer sees the runs of a project; an editor also submits, changes and deletes them.</p>
      </div>
    </div>
    <${Notice} problem=${refused ?? problem} />
    <div class="grid">
      ${(value ?? []).map((project) => html`<${Project} key=${project.id} project=${project} me=${me} change=${change} />`)}
      <${Sheet} title="New project">
        <${NameForm} id="project" label="Name" hint="letters, digits and . _ @ -" verb="Create"
          send=${(name) => change("", "POST", { name })} />
      </${Sheet}>
      <${Datasets} />
    </div>`;
}

function Project({ project, me, change }) {
  const { id, members, role } = project;
  const [leaving, setLeaving] = useState(null);
  const [deleting, setDeleting] = useState(false);
  const [newRole, setNewRole] = useState("viewer");
  const path = (member) => `/${id}/members/${encodeURIComponent(member)}`;
  const answered = (yes) => {
    if (yes) change(path(leaving), "DELETE");
    setLeaving(null);
  };
  const answeredDeletion = (yes) => {
    if (yes) change(`/${id}`, "DELETE");
    setDeleting(false);
  };
  const changeable = role === "owner" && project.name !== project.owner;
  const tools = html`
    <div class="actions">
      ${changeable && html`<button onClick=${() => setDeleting(true)}>Delete<span class="unseen"> ${project.name}</span></button>`}
      <a class="button" href=${`#/runs?project=${id}`}>Runs</a>
    </div>`;
  return html`
    <${Sheet} title=${projectName(project)} note=${role === "owner" ? "" : `you are ${role}`} tools=${tools}>
      ${members.length === 0 && html`<p class="soft small members">No members: only the owner and administrators see its runs.</p>`}
      ${members.length > 0 && html`
        <table class="members">
          <thead><tr><th scope="col">Member</th><th scope="col">Role</th><th scope="col"><span class="unseen">Actions</span></th></tr></thead>
          <tbody>${members.map((member) => html`
            <tr key=${member.name}>
              <th scope="row">${member.name}</th>
              <td>${role === "owner"
                ? html`<${RoleSelect} label=${`Role of ${member.name}`} value=${member.role} choose=${(each) => change(path(member.name), "PUT", { role: each })} />`
                : member.role}</td>
              <td>${(role === "owner" || member.name === me) && html`
                <button onClick=${() => setLeaving(member.name)}>
                  ${member.name === me ? "Leave" : "Remove"}<span class="unseen"> ${member.name}</span></button>`}</td>
            </tr>`)}</tbody>
        </table>`}
      ${role === "owner" && html`
        <${NameForm} id=${`member-${id}`} label="New member" hint="as in the member's own tokens" verb="Add"
          send=${(name) => change(path(name), "PUT", { role: newRole })}>
          <${RoleSelect} label="Role" value=${newRole} choose=${setNewRole} />
        </${NameForm}>`}
      ${changeable && html`
        <${NameForm} id=${`name-${id}`} label="New name" hint="letters, digits and . _ @ -" verb="Rename"
          send=${(name) => change(`/${id}`, "PATCH", { name })} />`}
      <${Secrets} project=${project} />
      ${deleting && html`
        <${Question} title=${`Delete the project ${project.name}?`} yes="Delete" danger answer=${answeredDeletion}>
          <p>Its members and secrets are deleted. A project with runs cannot be deleted.</p>
        </${Question}>`}
      ${leaving && html`
        <${Question} title=${`Remove ${leaving} from ${project.name}?`} yes="Remove" danger answer=${answered}>
          <p>${leaving === me ? "You no longer see" : `${leaving} no longer sees`} the runs of this project. The runs stay in it.</p>
        </${Question}>`}
    </${Sheet}>`;
}

const RoleSelect = ({ label, value, choose }) => html`
  <select aria-label=${label} value=${value} onChange=${(event) => choose(event.target.value)}>
    ${ROLES.map((role) => html`<option key=${role} value=${role}>${role}</option>`)}
  </select>`;

/** A form with one name. @param {{id: string, label: string, hint: string, verb: string, send: (name: string) => Promise<boolean>, children?: unknown}} props */
function NameForm({ id, label, hint, verb, send, children }) {
  const [name, setName] = useState("");
  const submit = async (event) => {
    event.preventDefault();
    if (await send(name.trim())) setName("");
  };
  return html`
    <form class="name-form" onSubmit=${submit}>
      <div class="field">
        <label for=${id}>${label}</label>
        <input id=${id} required maxlength="64" autocomplete="off" spellcheck="false" aria-describedby=${`${id}-hint`}
          value=${name} onInput=${(event) => setName(event.target.value)} />
        <span class="hint" id=${`${id}-hint`}>${hint}</span>
      </div>
      ${children}
      <button disabled=${!name.trim()}>${verb}</button>
    </form>`;
}
