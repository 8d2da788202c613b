/** Results of a run by stage, validation, tasks, and samples of its model. */

import { html } from "../lib.js";
import { NumberHeads, Scroll, Sheet } from "../parts/small.js";
import { decimal, dollars, duration, whole } from "../words.js";

const tokens = (number) => (number == null ? "–" : whole(number));

/** @param {{report: any}} props The report so far. */
export function Results({ report }) {
  if (!report?.stages?.length) return null;
  const { bill } = report;
  return html`
    <${Sheet} title="Report" note=${bill.complete ? dollars(bill.dollars) : "so far"}>
      <${Scroll} label="Report">
        <table>
          <thead><tr>
            <th scope="col">Stage</th><th scope="col">Pool</th>
            <${NumberHeads} titles=${["Workers", "Tokens", "Time", "Cost", "Loss", "Perplexity"]} />
          </tr></thead>
          <tbody>${report.stages.map((stage) => html`
            <tr key=${stage.name}>
              <th scope="row">${stage.name}</th>
              <td class="soft">${stage.pool.replace("_", "-")}</td>
              <td class="number">${stage.workers}</td>
              <td class="number">${tokens(stage.tokens)}</td>
              <td class="number">${duration(stage.seconds)}</td>
              <td class="number">${dollars(stage.dollars)}</td>
              <td class="number">${decimal(stage.loss, 4)}</td>
              <td class="number">${decimal(stage.perplexity, 2)}</td>
            </tr>`)}</tbody>
          <tfoot>
            <tr>
              <th scope="row">total</th><td></td><td></td>
              <td class="number">${tokens(report.tokens)}</td><td class="number">${duration(bill.seconds)}</td>
              <td class="number">${dollars(bill.dollars)}</td><td></td><td></td>
            </tr>
            ${bill.idle.map((line) => html`
              <tr key=${line.pool}>
                <th scope="row">idle machines</th><td class="soft">${line.pool.replace("_", "-")}</td><td></td><td></td>
                <td class="number">${duration(line.worker_seconds)}</td>
                <td class="number">${dollars(line.dollars)}</td><td></td><td></td>
              </tr>`)}
            ${bill.idle.length > 0 && html`
              <tr>
                <th scope="row">total with idle machines</th><td></td><td></td><td></td><td></td>
                <td class="number">${dollars(bill.dollars_with_idle)}</td><td></td><td></td>
              </tr>`}
            ${bill.complete && bill.baseline && html`
              <tr>
                <th scope="row">${bill.baseline.name} (estimate)</th><td></td><td></td>
                <td class="number">${tokens(report.tokens)}</td><td class="number">${duration(bill.baseline.seconds)}</td>
                <td class="number">${dollars(bill.baseline.dollars)}</td><td></td><td></td>
              </tr>`}
          </tfoot>
        </table>
      </${Scroll}>
      ${(report.machines ?? []).map((note) => html`<p class="soft" key=${note.kind}>Cards ${note.words}.</p>`)}
    </${Sheet}>
    <${Validation} evaluation=${report.evaluation} apart=${report.submodels_apart} />
    <${Tasks} tasks=${report.evaluation?.lm_eval ?? []} />
    <${Samples} samples=${report.samples ?? []} />`;
}

function Validation({ evaluation, apart }) {
  if (evaluation?.perplexity == null) return null;
  const { unseen, start, ensemble } = evaluation;
  const result = evaluation.apart?.kept_apart && ensemble ? ensemble : evaluation;
  const before = new Map((start?.sources ?? []).map((entry) => [entry.source, entry]));
  const merged = result === evaluation ? "" : ", merged";
  const rows = [
    [`all${merged}`, evaluation], ...(start ? [["all, with the start model", start]] : []),
    ...(ensemble ? [["sub-models as an ensemble", ensemble]] : []),
    ...(evaluation.sources ?? []).flatMap((entry) => [
      [`${entry.source}${merged}`, entry],
      ...(before.has(entry.source) ? [[`${entry.source}, with the start model`, before.get(entry.source)]] : [])]),
    ...Object.entries(evaluation.owners ?? {}).flatMap(([owner, entry]) => [
      [`${owner}'s text`, entry],
      ...(entry.stages?.submodels ? [[`${owner}'s text, with the owner's sub-model`, entry.stages.submodels]] : [])]),
    ...(unseen?.sources.length > 1 ? [[`all, never trained on${merged}`, unseen]] : []),
    ...(unseen?.sources ?? []).map((entry) => [`${entry.source}, never trained on${merged}`, entry]),
  ];
  return html`
    <${Sheet} title="Validation" note=${`perplexity ${decimal(result.perplexity, 2)}`} span="half">
      <${Scroll} label="Validation">
        <table>
          <thead><tr>
            <th scope="col">Source</th>
            <${NumberHeads} titles=${["Perplexity", "Bits per byte", "Documents", "Tokens"]} />
          </tr></thead>
          <tbody>${rows.map(([name, figures]) => html`
            <tr key=${name}>
              <th scope="row">${name}</th>
              <td class="number">${decimal(figures.perplexity, 2)}</td><td class="number">${decimal(figures.bits_per_byte, 3)}</td>
              <td class="number">${tokens(figures.documents)}</td><td class="number">${tokens(figures.tokens)}</td>
            </tr>`)}</tbody>
        </table>
      </${Scroll}>
      ${apart && html`<p class="small verdict-words">${sentence(apart)}</p>`}
    </${Sheet}>`;
}

/** @param {string} words Words of a report, without a capital and a full stop. */
const sentence = (words) => `${words[0].toUpperCase()}${words.slice(1)}.`;

function Tasks({ tasks }) {
  if (!tasks.length) return null;
  const share = (value, error) => (value == null ? "–" : `${decimal(value, 3)}${error == null ? "" : ` ± ${decimal(error, 3)}`}`);
  return html`
    <${Sheet} title="Tasks" note="by lm-eval" span="half">
      <${Scroll} label="Tasks">
        <table>
          <thead><tr>
            <th scope="col">Task</th><${NumberHeads} titles=${["Accuracy", "By length", "Chance", "Examples"]} />
          </tr></thead>
          <tbody>${tasks.map((entry) => html`
            <tr key=${entry.task}>
              <th scope="row">${entry.task}</th>
              <td class="number">${share(entry.acc, entry.acc_stderr)}</td>
              <td class="number">${share(entry.acc_norm, entry.acc_norm_stderr)}</td>
              <td class="number">${decimal(entry.chance, 3)}</td><td class="number">${tokens(entry.examples)}</td>
            </tr>`)}</tbody>
        </table>
      </${Scroll}>
    </${Sheet}>`;
}

function Samples({ samples }) {
  if (!samples.length) return null;
  return html`
    <${Sheet} title="Samples" span="half">
      <ul class="samples">
        ${samples.map(({ prompt, text }) => html`
          <li key=${prompt}><pre><b>${prompt}</b>${text.startsWith(prompt) ? text.slice(prompt.length) : text}</pre></li>`)}
      </ul>
    </${Sheet}>`;
}
