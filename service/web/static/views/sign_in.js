/** Sign-in: exchanges a token for a browser session. */

import { ask } from "../api.js";
import { html, useState } from "../lib.js";
import { Notice } from "../parts/small.js";

/** @param {{problem: Error | null, signedIn: () => void}} props `problem`: error of a code or token in the URL. */
export function SignIn({ problem: earlier, signedIn }) {
  const [token, setToken] = useState("");
  const [busy, setBusy] = useState(false);
  const [problem, setProblem] = useState(earlier);
  const submit = async (event) => {
    event.preventDefault();
    setBusy(true);
    setProblem(null);
    try {
      await ask("/v1/session", { method: "POST", body: { token: token.trim() } });
      signedIn();
    } catch (error) {
      setProblem(error);
      setBusy(false);
    }
  };
  return html`
    <main class="signin" id="main">
      <div class="sheet">
        <form onSubmit=${submit}>
          <div>
            <h1>Sign in</h1>
            <p class="soft small">MoE-DisCo trains Mixture-of-Experts models mostly on cheap GPUs.</p>
          </div>
          <${Notice} problem=${problem} />
          <div class="field">
            <label for="token">Access token</label>
            <input
              id="token" name="token" type="password" autocomplete="current-password" spellcheck="false" required maxlength="256"
              placeholder="mdk_…" aria-describedby="token-hint"
              value=${token} onInput=${(event) => setToken(event.target.value)}
            />
            <span class="hint" id="token-hint">
              Ask an administrator of the service for a token. This browser keeps a session, not the token.
            </span>
          </div>
          <button class="primary" disabled=${busy || !token.trim()}>${busy ? "Signing in…" : "Sign in"}</button>
        </form>
      </div>
    </main>`;
}
