// What is wrong with the page's layout, one line a finding. Returned by the function that WebDriver wraps around this.
const problems = [];
const width = document.documentElement.clientWidth;
const box = element => element.getBoundingClientRect();
const shown = element => element.checkVisibility() && box(element).width > 0;
const name = element => `${element.closest("section")?.id || "page"} <${element.tagName.toLowerCase()}> '${element.textContent.trim().slice(0, 40)}'`;
const apart = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) < 1 || Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) < 3;

function overlaps(elements) {
  elements.forEach((a, i) => elements.slice(i + 1).forEach(b => {
    if (!apart(box(a), box(b)) && !a.contains(b) && !b.contains(a)) problems.push(`overlap: ${name(a)} and ${name(b)}`);
  }));
}

if (document.documentElement.scrollWidth > width) problems.push(`the page is ${document.documentElement.scrollWidth} wide, its window ${width}`);
for (const element of document.querySelectorAll("body *")) {
  if (!shown(element) || element.closest(".numbers")?.contains(element) || element.closest("svg, script, style")) continue;
  const { left, right } = box(element);
  if (left < -1 || right > width + 1) problems.push(`outside the window: ${name(element)} from ${left} to ${right}`);
  if (element.scrollWidth > element.clientWidth + 1 && element.clientWidth > 0 && getComputedStyle(element).display !== "inline") problems.push(`cut off: ${name(element)}`);
}
const drawings = Array.from(document.querySelectorAll("figure svg")).filter(shown);
for (const drawing of drawings) {
  const frame = box(drawing), texts = Array.from(drawing.querySelectorAll("text")).filter(shown);
  if (texts.length < 3) problems.push(`a drawing without text: ${name(drawing)}`);
  for (const text of texts) {
    const { left, right, top, bottom } = box(text);
    if (left < frame.left - 1 || right > frame.right + 1 || top < frame.top - 1 || bottom > frame.bottom + 1) problems.push(`cut off: ${name(text)}`);
    if (parseFloat(getComputedStyle(text).fontSize) * frame.width / drawing.viewBox.baseVal.width < 9.5) problems.push(`too small to read: ${name(text)}`);
  }
  overlaps(texts);
}
if (drawings.length !== document.querySelectorAll("figure").length) problems.push(`${drawings.length} drawings are shown in ${document.querySelectorAll("figure").length} figures`);
overlaps(Array.from(document.querySelectorAll("h1, h2, p, dt, dd, figcaption, figure svg, summary, label, output, li, .prompt, input")).filter(shown));
return problems;
