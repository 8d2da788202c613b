/** What a finished run came to, above everything else: its held-out loss, and the plan's sentence with its own figures. */

import { html } from "../lib.js";
import { Verdict } from "../parts/small.js";
import { decimal } from "../words.js";

/** @param {{report: any, parentLoss: number | null}} props The report so far, and the held-out loss of the run that this one retries. */
export function RunVerdict({ report, parentLoss }) {
  const evaluation = report?.evaluation;
  const sentence = evaluation?.perplexity == null ? null : lossWords(evaluation, parentLoss);
  if (sentence === null && !report?.bill.verdict) return null;
  return html`
    <div class="came-to">
      ${sentence && html`<p class="result-words">${sentence}</p>`}
      ${report.against_start?.worse && html`<p class="notice" role="alert">${report.against_start.words}.</p>`}
      <${Verdict} bill=${report.bill} />
    </div>`;
}

/** Held-out figures of the result, next to those of the parent and of the model that the run started from. */
function lossWords(evaluation, parentLoss) {
  const { apart, ensemble, start } = evaluation;
  const result = apart?.kept_apart && ensemble ? ensemble : evaluation;
  const inBytes = result.bits_per_byte == null ? "" : `, ${decimal(result.bits_per_byte, 3)} bits per byte`;
  const figures = `perplexity ${decimal(result.perplexity, 2)}${inBytes}`;
  if (result.loss == null) return `Held-out text: ${figures}.`;
  const parent = parentLoss == null ? "" : `, parent ${decimal(parentLoss, 4)}`;
  const loss = `Held-out loss ${decimal(result.loss, 4)} nats per token (${figures})${parent}`;
  if (start?.loss == null) return `${loss}.`;
  const change = `${decimal(Math.abs(result.loss - start.loss), 4)} ${result.loss > start.loss ? "above" : "below"}`;
  return `${loss}, ${change} the ${decimal(start.loss, 4)} of the model that the run started from.`;
}
