/** The page: sign-in state, frame, and the view of the current route. */

import { ask, onSignedOut } from "./api.js";
import { watchConnection } from "./connection.js";
import { html, render, useEffect, useRef, useState } from "./lib.js";
import { useRoute } from "./router.js";
import { AccountView } from "./views/account.js";
import { CompareView } from "./views/compare.js";
import { PoolsView } from "./views/pools.js";
import { ProjectsView } from "./views/projects.js";
import { RunView } from "./views/run.js";
import { RunsView } from "./views/runs.js";
import { SignIn } from "./views/sign_in.js";
import { RetryView, SubmitView } from "./views/submit.js";

const PLACES = [["#/runs", "Runs", ["runs", "run", "compare"]], ["#/submit", "New run", ["submit", "retry"]], ["#/projects", "Projects", ["projects"]],
  ["#/pools", "Pools", ["pools"]]];
const TITLES = { runs: "Runs", run: "Run", submit: "New run", retry: "Retry", compare: "Comparison", pools: "Pools", projects: "Projects", account: "Account", unknown: "Not found" };

/**
 * A sign-in code or a token in the URL, `/#code=...` or `/#token=...`, which is removed from the URL and the history entry.
 * @returns {{code: string} | {token: string} | null}
 */
function proofOfAddress() {
  const found = /^#(code|token)=([\w.~-]+)$/.exec(location.hash);
  if (!found) return null;
  history.replaceState(null, "", location.pathname);
  return { [found[1]]: found[2] };
}

function App() {
  const [identity, setIdentity] = useState(undefined);
  const [problem, setProblem] = useState(null);
  const identify = async () => {
    try {
      setIdentity(await ask("/v1/identity"));
      setProblem(null);
    } catch (error) {
      if (error.status === 401) setIdentity(null);
      else setProblem(error);
    }
  };
  useEffect(() => {
    onSignedOut(() => setIdentity(null));
    const signInByAddress = async (proof) => {
      // Remove the data of an earlier user from the page
      setIdentity(undefined);
      setProblem(null);
      try {
        await ask("/v1/session", { method: "POST", body: proof });
      } catch (error) {
        setProblem(error);
        setIdentity(null);
        return;
      }
      await identify();
    };
    const moved = () => {
      const proof = proofOfAddress();
      if (proof) signInByAddress(proof);
      return proof !== null;
    };
    if (!moved()) identify();
    // If a link is opened in a tab that already shows the page, only the fragment changes
    addEventListener("hashchange", moved);
    const unwatch = watchConnection((reached) => reached && identify());
    return () => {
      removeEventListener("hashchange", moved);
      unwatch();
    };
  }, []);
  const signOut = async () => {
    await ask("/v1/session", { method: "DELETE" });
    setIdentity(null);
  };
  return html`
    <${Connection} />
    ${identity === null && html`<${SignIn} problem=${problem} signedIn=${identify} />`}
    ${identity === undefined && html`<${Waiting} problem=${problem} />`}
    ${identity && html`<${Frame} identity=${identity} signOut=${signOut} />`}
    <p id="announcer" class="unseen" role="status" aria-live="polite"></p>`;
}

function Frame({ identity, signOut }) {
  const route = useRoute();
  const main = useRef(null);
  const first = useRef(true);
  const places = [...PLACES, ["#/account", identity.scopes.includes("admin") ? "Admin" : "Account", ["account"]]];
  const place = `${route.view}/${route.id ?? ""}`;
  useEffect(() => {
    document.title = `${TITLES[route.view]} · MoE-DisCo`;
    if (!first.current) {
      main.current.focus({ preventScroll: true });
      scrollTo(0, 0);
    }
    first.current = false;
  }, [place]);
  const skip = (event) => {
    event.preventDefault();
    main.current.focus();
  };
  return html`
    <a class="skip" href="#main" onClick=${skip}>Skip to content</a>
    <header class="bar">
      <div>
        <a class="brand" href="#/runs"><img src="static/icon.svg" alt="" />MoE-DisCo</a>
        <nav aria-label="Main">
          <ul>${places.map(([address, words, views]) => html`
            <li><a href=${address} aria-current=${views.includes(route.view) ? "page" : null}>${words}</a></li>`)}</ul>
        </nav>
        <div class="who">
          <a href="reference">API</a>
          <span>${identity.owner}</span>
          <button class="plain" onClick=${signOut}>Sign out</button>
        </div>
      </div>
    </header>
    <main id="main" tabindex="-1" ref=${main}>
      ${route.view === "runs" && html`<${RunsView} filter=${route.filter} />`}
      ${route.view === "run" && html`<${RunView} key=${route.id} id=${route.id} />`}
      ${route.view === "submit" && html`<${SubmitView} key=${route.id} from=${route.id} />`}
      ${route.view === "retry" && html`<${RetryView} key=${route.id} id=${route.id} changes=${route.changes} />`}
      ${route.view === "compare" && html`<${CompareView} key=${route.id} ids=${route.id.split(",")} />`}
      ${route.view === "pools" && html`<${PoolsView} dashboard=${identity.dashboard_url} />`}
      ${route.view === "projects" && html`<${ProjectsView} me=${identity.owner} />`}
      ${route.view === "account" && html`<${AccountView} identity=${identity} />`}
      ${route.view === "unknown" && html`<div class="empty"><h1>Page not found</h1><p><a href="#/runs">All runs</a></p></div>`}
    </main>`;
}

const Waiting = ({ problem }) => html`
  <main class="empty" id="main">
    <h1 class="unseen">MoE-DisCo</h1>
    <p>${problem ? problem.message : "Loading…"}</p>
  </main>`;

function Connection() {
  const [reached, setReached] = useState(true);
  useEffect(() => watchConnection(setReached), []);
  return html`<div role="status" aria-live="polite">
    ${!reached && html`
      <div class="away"><p>The service cannot be reached. The page may show old data until the connection is back.</p></div>`}
  </div>`;
}

render(html`<${App} />`, document.getElementById("app"));
