// Keeps the usage page and its widget, <metered-usage>, up to date without a reload.
//
// Both ask again when the application says that something was used (a "metered:changed" event on the window, here or in another tab
// through the BroadcastChannel "metered"), when they come into sight, and every few seconds while they are in sight.
"use strict";

(() => {
  const base = new URL(".", document.currentScript.src);
  const AWAY = "Your usage cannot be refreshed right now. What you see may be old; it goes on by itself.";
  const GONE = "You are not signed in any more. Reload the page to see your usage.";
  const channel = "BroadcastChannel" in window ? new BroadcastChannel("metered") : null;
  const watched = new Set();

  class Watch {
    // root: what holds [data-content], [data-announce] and [data-problem]. host: what is busy.
    constructor(host, root, url, seconds) {
      Object.assign(this, { host, root, url, seconds, timer: 0, running: null, again: false });
      this.announced = root.querySelector("[data-summary]")?.dataset.summary ?? null;
      watched.add(this);
      this.wait();
    }

    stop() {
      watched.delete(this);
      clearTimeout(this.timer);
      this.aborter?.abort();
    }

    wait() {
      clearTimeout(this.timer);
      if (this.seconds > 0 && watched.has(this)) {
        this.timer = setTimeout(() => (document.hidden ? this.wait() : this.refresh()), this.seconds * 1000);
      }
    }

    // One request at a time; what was used while one ran is asked for once more after it.
    refresh() {
      if (this.running) {
        this.again = true;
      } else {
        this.running = this.ask().finally(() => {
          this.running = null;
          if (this.again && watched.has(this)) {
            this.again = false;
            return this.refresh();
          }
          this.wait();
        });
      }
      return this.running;
    }

    async ask() {
      this.host.setAttribute("aria-busy", "true");
      this.aborter = new AbortController();
      const timeout = setTimeout(() => this.aborter.abort(), 30000);
      try {
        const answer = await fetch(this.url, { cache: "no-store", credentials: "same-origin", signal: this.aborter.signal });
        const text = await answer.text();
        if (answer.ok && !answer.redirected) {
          this.show(new DOMParser().parseFromString(text, "text/html"));
        } else if (answer.status === 503) {
          this.problem(AWAY, new DOMParser().parseFromString(text, "text/html").querySelector(".notice")?.textContent);
        } else {
          this.problem(GONE, GONE);
          this.stop();
        }
      } catch {
        if (watched.has(this)) this.problem(AWAY, AWAY);
      } finally {
        clearTimeout(timeout);
        this.host.setAttribute("aria-busy", "false");
      }
    }

    problem(beside, alone) {
      const content = this.root.querySelector("[data-content]");
      const shown = content.querySelector("[data-part]");
      if (!shown) content.replaceChildren();
      const problem = this.root.querySelector("[data-problem]");
      problem.textContent = shown ? beside : alone ?? beside;
      problem.hidden = false;
    }

    // Only what has changed is replaced, so that open tables stay open and the keyboard stays where it was.
    show(fresh) {
      const content = this.root.querySelector("[data-content]");
      const parts = [...fresh.querySelectorAll("[data-part]")];
      const shown = new Map([...content.querySelectorAll("[data-part]")].map((part) => [part.dataset.part, part]));
      const focused = (this.root.activeElement ?? document.activeElement)?.id;
      const open = [...content.querySelectorAll("details[open]")].map((each) => each.id);
      if (shown.size !== parts.length) content.replaceChildren();
      for (const part of parts) {
        const old = shown.size === parts.length ? shown.get(part.dataset.part) : null;
        const made = document.importNode(part, true);
        for (const id of open) made.querySelector(`#${CSS.escape(id)}`)?.setAttribute("open", "");
        if (!old) content.append(made);
        else if (old.outerHTML !== made.outerHTML) {
          const had = focused && old.querySelector(`#${CSS.escape(focused)}`);
          old.replaceWith(made);
          if (had) made.querySelector(`#${CSS.escape(focused)}`)?.focus({ preventScroll: true });
        }
      }
      this.root.querySelector("[data-problem]").hidden = true;
      const summary = content.querySelector("[data-summary]")?.dataset.summary ?? "";
      if (this.announced !== null && this.announced !== summary) {
        this.root.querySelector("[data-announce]").textContent = summary;
      }
      this.announced = summary;
    }
  }

  const refreshAll = () => Promise.all([...watched].map((each) => each.refresh()));

  window.addEventListener("metered:changed", () => {
    channel?.postMessage("changed");
    refreshAll();
  });
  channel?.addEventListener("message", refreshAll);
  document.addEventListener("visibilitychange", () => document.hidden || refreshAll());
  window.addEventListener("pageshow", (event) => event.persisted && refreshAll());

  class MeteredUsage extends HTMLElement {
    connectedCallback() {
      const root = this.shadowRoot ?? this.attachShadow({ mode: "open" });
      const style = document.createElement("link");
      style.rel = "stylesheet";
      style.href = new URL("usage.css", base);
      const frame = document.createElement("div");
      frame.hidden = true;
      style.onload = style.onerror = () => (frame.hidden = false);
      frame.append(...this.frame());
      root.replaceChildren(style, frame);

      const url = new URL("widget", base);
      if (this.hasAttribute("meter")) url.searchParams.set("meter", this.getAttribute("meter"));
      const seconds = Number(this.getAttribute("refresh") ?? 15);
      this.watch = new Watch(this, root, url, Number.isFinite(seconds) ? seconds : 15);
      this.watch.refresh();
    }

    disconnectedCallback() {
      this.watch?.stop();
    }

    // The application calls this, or dispatches "metered:changed" on the window.
    refresh() {
      return this.watch?.refresh();
    }

    frame() {
      const announce = document.createElement("p");
      announce.className = "unseen";
      announce.setAttribute("role", "status");
      announce.dataset.announce = "";
      const problem = document.createElement("p");
      problem.className = "notice problem";
      problem.setAttribute("role", "alert");
      problem.dataset.problem = "";
      problem.hidden = true;
      const content = document.createElement("div");
      content.dataset.content = "";
      const loading = document.createElement("div");
      loading.className = "meter loading";
      const words = document.createElement("p");
      words.className = "numbers";
      words.setAttribute("role", "status");
      words.textContent = "Loading your usage…";
      const bar = document.createElement("div");
      bar.className = "bar";
      loading.append(words, bar);
      content.append(loading);
      return [announce, problem, content];
    }
  }

  customElements.define("metered-usage", MeteredUsage);

  const page = document.querySelector("[data-fragment]");
  if (page) {
    const watch = new Watch(page, page, new URL(page.dataset.fragment, document.baseURI), Number(page.dataset.refresh));
    const button = page.querySelector("#refresh");
    button.hidden = false;
    button.addEventListener("click", () => watch.refresh());
  }
})();
