/** YAML editor of a configuration: names and values from the schema, marked mistakes, and the changes to an earlier text. */

import { ask } from "../api.js";
import { html, useEffect, useRef } from "../lib.js";
import {
  autocompletion, closeBrackets, Compartment, completionKeymap, defaultKeymap, EditorState, EditorView, HighlightStyle, history, historyKeymap,
  hoverTooltip, keymap, lineNumbers, lintGutter, setDiagnostics, syntaxHighlighting, tags, unifiedMergeView, yaml,
} from "../vendor/codemirror.js";
import { sectionPath, settingAt, settingsOf } from "./schema.js";

/** Lines around a change that stay when unchanged ones are folded. */
const AROUND = { margin: 2, minSize: 5 };

const COLOURS = HighlightStyle.define([
  { tag: [tags.propertyName, tags.definition(tags.propertyName)], color: "var(--accent)" },
  { tag: tags.comment, color: "var(--soft)", fontStyle: "italic" },
  { tag: [tags.string, tags.special(tags.string)], color: "var(--good)" },
]);

const THEME = EditorView.theme({
  "&": { height: "100%", color: "var(--ink)", fontSize: "0.8125rem" },
  "&.cm-focused": { outline: "none" },
  ".cm-scroller": { fontFamily: "var(--mono)", lineHeight: "1.55" },
  ".cm-content": { caretColor: "var(--ink)", padding: "0.6rem 0" },
  ".cm-gutters": { backgroundColor: "var(--well)", color: "var(--soft)", borderRight: "1px solid var(--line)" },
  ".cm-tooltip": { backgroundColor: "var(--sheet)", color: "var(--ink)", border: "1px solid var(--edge)", borderRadius: "8px" },
  ".cm-tooltip-autocomplete ul li[aria-selected]": { backgroundColor: "var(--accent)", color: "var(--accent-ink)" },
  ".setting": { maxWidth: "26rem", padding: "0.5rem 0.7rem", font: "0.8125rem/1.45 var(--sans)", whiteSpace: "normal" },
  ".setting strong, .setting span": { display: "block" },
  ".setting span": { color: "var(--soft)" },
  // The library draws these by images, which the policy of the page does not allow
  ".cm-lintRange-error": { backgroundImage: "none", textDecoration: "underline wavy var(--bad)" },
  ".cm-lint-marker-error": { content: "normal", width: "0.55em", height: "0.55em", borderRadius: "50%", backgroundColor: "var(--bad)" },
  ".cm-changedLine": { backgroundColor: "var(--good-wash) !important" },
  ".cm-deletedChunk": { backgroundColor: "var(--bad-wash) !important" },
  ".cm-collapsedLines": { background: "var(--well)", color: "var(--soft)" },
  ".cm-collapsedLines:before, .cm-collapsedLines:after": { content: "'…'" }, // the font has no sign of the library's
});

/**
 * @param {{label: string, start: {text: string}, change: (text: string) => void, mistakes: import("./yaml.js").Mistake[],
 *   before?: string | null, folded?: boolean}} props
 *   `start`: text to begin with; a new object replaces what was written. `before`: text whose differences are marked; `folded`: whether unchanged lines are folded.
 */
export function Editor({ label, start, change, mistakes, before = null, folded = false }) {
  const host = useRef(null);
  const view = useRef(null);
  const parts = useRef(null);
  const changed = useRef(change);
  changed.current = change;
  useEffect(() => {
    const [attributes, differences] = [new Compartment(), new Compartment()];
    parts.current = { attributes, differences };
    // The policy of the page allows no style elements, and only below a shadow root does the editor do without them
    const root = host.current.attachShadow({ mode: "open" });
    const state = EditorState.create({
      doc: start.text,
      extensions: [
        lineNumbers(), history(), closeBrackets(), yaml(), syntaxHighlighting(COLOURS), lintGutter(), THEME,
        autocompletion({ override: [completed] }), hoverTooltip(hovered),
        keymap.of([...completionKeymap, ...defaultKeymap, ...historyKeymap]),
        attributes.of([]), differences.of([]),
        EditorView.updateListener.of((update) => update.docChanged && changed.current(update.state.doc.toString())),
      ],
    });
    view.current = new EditorView({ state, parent: root, root });
    return () => view.current.destroy();
  }, []);
  useEffect(() => {
    const { state } = view.current;
    if (state.doc.toString() !== start.text) view.current.dispatch({ changes: { from: 0, to: state.doc.length, insert: start.text } });
  }, [start]);
  useEffect(() => {
    const said = { "aria-label": label, "aria-invalid": String(mistakes.length > 0), spellcheck: "false", autocapitalize: "off", tabindex: "0" };
    view.current.dispatch({ effects: parts.current.attributes.reconfigure(EditorView.contentAttributes.of(said)) });
    const { state } = view.current;
    const marked = mistakes.filter(({ line }) => line !== null && line <= state.doc.lines);
    view.current.dispatch(setDiagnostics(state, marked.map(({ line, message }) => {
      const { from, to } = state.doc.line(line);
      return { from, to, message, severity: "error" };
    })));
  }, [label, JSON.stringify(mistakes)]);
  useEffect(() => {
    const extension = before === null ? [] : unifiedMergeView({
      original: before, mergeControls: false, gutter: false, collapseUnchanged: folded ? AROUND : undefined,
    });
    view.current.dispatch({ effects: parts.current.differences.reconfigure(extension) });
  }, [before, folded]);
  const goTo = (line) => {
    const { doc } = view.current.state;
    const { from, to } = doc.line(Math.min(line, doc.lines));
    view.current.focus();
    view.current.dispatch({ selection: { anchor: from, head: to }, scrollIntoView: true });
  };
  return html`
    <div class="editor" ref=${host}></div>
    <ul class="mistakes" aria-live="polite">
      ${mistakes.map((mistake) => html`
        <li key=${mistake.field + mistake.message}>
          ${mistake.line !== null && html`
            <button type="button" class="plain" onClick=${() => goTo(mistake.line)}>Line ${mistake.line}</button>`}
          <span>${mistake.field && html`<code>${mistake.field}</code> `}${mistake.message}</span>
        </li>`)}
    </ul>`;
}

/** The configuration's schema, requested once; null if it cannot be had, because the editor works without it. */
let schema = null;
async function loadedSchema() {
  schema ??= await ask("/v1/schema").catch(() => null);
  return schema;
}

/** Names of settings at the beginning of a line, and values behind a name. */
async function completed(context) {
  const { state, pos } = context;
  const line = state.doc.lineAt(pos);
  const [, lead, name, value] = /^( *(?:- +)*)([\w-]*)(?:: +(\S*))?$/.exec(line.text.slice(0, pos - line.from)) ?? [];
  if (lead === undefined || (!context.explicit && !name)) return null;
  const schema = await loadedSchema();
  if (schema === null) return null;
  const path = sectionPath(linesOf(state), line.number - 1, lead.length);
  if (value !== undefined) {
    const values = settingAt(schema, path, name)?.values ?? [];
    return values.length ? { from: pos - value.length, options: values.map((each) => ({ label: each })) } : null;
  }
  const options = settingsOf(schema, path).map((setting) => ({
    label: setting.name,
    detail: setting.default ?? undefined,
    apply: setting.isSection ? `${setting.name}:\n${" ".repeat(lead.length + 2)}` : `${setting.name}: `,
    info: () => words(setting),
  }));
  return options.length ? { from: pos - name.length, options, validFor: /^[\w-]*$/ } : null;
}

/** What a setting means, at its name. */
async function hovered({ state }, pos) {
  const line = state.doc.lineAt(pos);
  const [, lead, name] = /^( *(?:- +)*)([\w-]+) *:/.exec(line.text) ?? [];
  const from = line.from + (lead?.length ?? 0);
  if (name === undefined || pos < from || pos > from + name.length) return null;
  const schema = await loadedSchema();
  const setting = schema && settingAt(schema, sectionPath(linesOf(state), line.number - 1, lead.length), name);
  return setting ? { pos: from, end: from + name.length, above: true, create: () => ({ dom: words(setting) }) } : null;
}

const linesOf = (state) => state.doc.toString().split("\n");

function words(setting) {
  const dom = Object.assign(document.createElement("div"), { className: "setting" });
  const facts = [setting.values.length > 0 && setting.values.join(", "), setting.default !== null && `default ${setting.default}`];
  for (const [kind, text] of [["strong", setting.name], ["p", setting.description], ["span", facts.filter(Boolean).join("; ")]]) {
    if (text) dom.append(Object.assign(document.createElement(kind), { textContent: text }));
  }
  return dom;
}
