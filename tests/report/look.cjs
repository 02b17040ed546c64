// Opens a page in a browser, in every width and colour scheme, and prints as JSON what it finds.
// SPDX-License-Identifier: Apache-2.0
//
// node look.cjs BROWSER PAGE: needs the npm packages puppeteer-core and axe-core on NODE_PATH.
const puppeteer = require("puppeteer-core");
const axe = require("axe-core");

async function look(browser, address, scheme, width) {
  const page = await browser.newPage();
  const said = [];
  page.on("console", (message) => said.push(message.text()));
  page.on("pageerror", (error) => said.push(String(error)));
  const asked = [];
  page.on("request", (request) => asked.push(request.url()));
  await page.setBypassCSP(true); // for axe alone; that the page needs no more than its policy is seen before
  await page.setViewport({ width, height: 900 });
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
  await page.goto(address);
  const folded = await page.evaluate(() => document.documentElement.scrollWidth);
  const reached = [];
  for (let presses = 0; presses < 4; presses++) {
    await page.keyboard.press("Tab");
    reached.push(await page.evaluate(() => {
      const style = getComputedStyle(document.activeElement);
      return [document.activeElement.tagName, style.outlineStyle];
    }));
  }
  await page.evaluate(() => document.querySelectorAll("details").forEach((found) => (found.open = true)));
  const open = await page.evaluate(() => document.documentElement.scrollWidth);
  const scrolled = await page.evaluate(
    () => [...document.querySelectorAll(".scroll")].filter((found) => found.scrollWidth > found.clientWidth + 1).length
  );
  await page.evaluate(axe.source);
  const result = await page.evaluate(() => window.axe.run());
  const findings = result.violations.map((found) => [found.impact, found.id, found.nodes[0].target.join(" ")]);
  await page.close();
  const network = asked.filter((url) => !url.startsWith("file:") && !url.startsWith("data:"));
  return { scheme, width, said, network, folded, open, scrolled, reached, findings };
}

async function main() {
  const [executablePath, address] = process.argv.slice(2);
  const args = ["--no-sandbox", "--disable-gpu", "--no-zygote", "--hide-scrollbars"];
  const browser = await puppeteer.launch({ executablePath, headless: "shell", args });
  const seen = [];
  for (const scheme of ["light", "dark"])
    for (const width of [360, 800, 1400]) seen.push(await look(browser, address, scheme, width));
  await browser.close();
  console.log(JSON.stringify(seen));
}

main();
