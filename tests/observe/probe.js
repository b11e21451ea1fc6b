// Appended to a report by the tests: operates the page like a reader and writes its findings into #probe.
const found = { paths: 0, problems: window.problems };
const press = (box, name) => [...document.querySelectorAll(`${box} button`)].find((button) => button.dataset.name === name).click();
const lines = () => [...document.querySelectorAll("#list .line")].map((line) => line.textContent);
const styles = () => [...document.querySelectorAll("#sample .token")].map((token) => token.style.background);
found.ready = Number(document.documentElement.dataset.ready);
found.charts = [...document.querySelectorAll(".chart h3")].map((title) => title.firstChild.textContent);
found.paths = [...document.querySelectorAll(".chart path")].filter((path) => path.getAttribute("d").length > 10).length;
found.bands = document.querySelectorAll(".chart path.band").length;
found.alarms = [...document.querySelectorAll(".alarm")].map((alarm) => alarm.textContent);
found.count = document.getElementById("count").textContent;
found.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
found.broken = document.getElementById("charts").innerHTML.includes("NaN");
found.filters = {};
for (const name of ["wrong, to GRPO", "truncated", "verifier failed", "highest divergence"]) {
  press("#filters", name);
  found.filters[name] = document.getElementById("count").textContent;
}
found.divergences = [...document.querySelectorAll("#list .line .number")].map((value) => Number(value.textContent));
found.colors = {};
for (const name of ["divergence", "entropy weight", "advantage", "teacher − policy"]) {
  press("#colors", name);
  found.colors[name] = styles();
}
document.querySelector("#sample .token").dispatchEvent(new PointerEvent("pointerenter"));
found.tip = document.getElementById("tip").textContent;
found.tipInside = document.getElementById("tip").getBoundingClientRect().right <= document.documentElement.clientWidth;
press("#filters", "all");
document.getElementById("search").value = "hostile";
document.getElementById("search").dispatchEvent(new Event("input"));
press("#axis", "hours");
setTimeout(() => {
  found.hostile = document.getElementById("sample").textContent;
  found.elements = document.querySelectorAll("#browser img, #browser script, #browser b, #browser iframe").length;
  found.ran = String(window.ran);
  found.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
  found.after = [...document.querySelectorAll(".chart path")].filter((path) => path.getAttribute("d").length > 10).length;
  document.body.append(Object.assign(document.createElement("pre"), { id: "probe", textContent: btoa(unescape(encodeURIComponent(JSON.stringify(found)))) }));
}, 400);
