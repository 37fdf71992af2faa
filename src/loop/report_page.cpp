#include "loop/report_page.h"

#include <fmt/format.h>

#include "loop/chart.h"

namespace lockstep::loop {

namespace {

// Ten colours that keep apart on paper white and on dark grey.
constexpr const char* kStyle = R"(
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --ink: #1d2126; --soft: #626b76; --rule: #e3e5e8;
  --c0: #2563a8; --c1: #c2571a; --c2: #2f8559; --c3: #8350a8; --c4: #a97f0a;
  --c5: #0f8b97; --c6: #b5446e; --c7: #6b7280; --c8: #7c5a3a; --c9: #4a4fa8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1b1f24; --ink: #e4e7ea; --soft: #98a2ad; --rule: #2e343b;
    --c0: #6ea8e6; --c1: #e8935a; --c2: #66bf93; --c3: #b98ddb; --c4: #d6b145;
    --c5: #4fc1cc; --c6: #e284a6; --c7: #a3abb5; --c8: #c09b76; --c9: #9297e8;
  }
}
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); } .c7 { --c: var(--c7); }
.c8 { --c: var(--c8); } .c9 { --c: var(--c9); }
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 40px 28px 72px; max-width: 1200px; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { margin: 0; font-size: 26px; font-weight: 650; letter-spacing: -0.01em; }
h2 { margin: 44px 0 14px; font-size: 18px; font-weight: 650; }
h3 { display: inline; margin: 0; font-size: 14px; font-weight: 600; }
small { color: var(--soft); font-weight: 400; }
p { margin: 4px 0; color: var(--soft); }
.headlines { display: flex; flex-wrap: wrap; gap: 12px; margin: 24px 0 8px; }
.headlines div {
  flex: 1 1 180px; padding: 14px 18px; background: var(--card); border: 1px solid var(--rule);
  border-radius: 8px;
}
.headlines b {
  display: block; font-size: 23px; font-weight: 600; letter-spacing: -0.01em;
  font-variant-numeric: tabular-nums;
}
.headlines span { color: var(--soft); font-size: 13px; }
dl { display: flex; flex-wrap: wrap; gap: 4px 22px; margin: 16px 0 0; font-size: 13.5px; }
dl div { display: flex; gap: 6px; }
dt { color: var(--soft); }
dd { margin: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 16px; }
figure {
  margin: 0; padding: 14px 16px 10px; background: var(--card); border: 1px solid var(--rule);
  border-radius: 8px; display: flex; flex-direction: column;
}
figcaption p { font-size: 12.5px; }
svg { display: block; width: 100%; height: auto; margin-top: auto; }
.legend {
  display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 6px 0 8px; padding: 0; list-style: none;
  color: var(--soft); font-size: 12.5px;
}
.legend b { color: var(--ink); font-weight: 550; font-variant-numeric: tabular-nums; }
.legend i {
  display: inline-block; width: 10px; height: 10px; margin-right: 6px; border-radius: 2px;
  background: var(--c);
}
.grid { stroke: var(--rule); stroke-width: 1; }
.axis { stroke: var(--soft); stroke-width: 1; }
.tick { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
.line { fill: none; stroke: var(--c); stroke-width: 1.7; stroke-linejoin: round; }
.dot { fill: var(--c); stroke: transparent; stroke-width: 9; pointer-events: all; }
.faint { fill: transparent; }
.dot:hover { fill: var(--c); r: 4px; }
.bar { fill: var(--c); }
.bar:hover { opacity: 0.75; }
.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: 8px; background: var(--card); margin-top: 16px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { padding: 7px 14px; text-align: left; vertical-align: top; border-top: 1px solid var(--rule); }
thead th { border-top: 0; color: var(--soft); font-weight: 550; white-space: nowrap; }
td { white-space: pre-wrap; overflow-wrap: anywhere; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
details { margin-top: 16px; }
summary { cursor: pointer; color: var(--soft); }
pre {
  margin: 12px 0 0; padding: 14px 18px; overflow-x: auto; background: var(--card);
  border: 1px solid var(--rule); border-radius: 8px; font: 12.5px/1.5 ui-monospace, monospace;
}
footer { margin-top: 48px; color: var(--soft); font-size: 12.5px; }
@media print { body { max-width: none; } figure, .headlines div { break-inside: avoid; } }
)";

}  // namespace

std::string html_page(const std::string& title, const std::string& body) {
  return fmt::format(
      "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
      "<title>{}</title>\n<style>{}</style>\n</head>\n<body>\n{}"
      "<footer>Written by lockstep report. Point at a curve for its values.</footer>\n"
      "</body>\n</html>\n",
      escape_html(title), kStyle, body);
}

std::string html_section(const std::string& heading, const std::string& content) {
  if (content.empty()) return "";
  return fmt::format("<section>\n<h2>{}</h2>\n{}</section>\n", escape_html(heading), content);
}

std::string html_headlines(const std::vector<Headline>& headlines) {
  std::string out;
  for (const Headline& h : headlines)
    if (!h.value.empty())
      out += fmt::format("<div><b>{}</b><span>{}</span></div>\n", escape_html(h.value),
                         escape_html(h.label));
  return out.empty() ? "" : "<div class=\"headlines\">\n" + out + "</div>\n";
}

std::string html_table(const std::vector<std::string>& head,
                       const std::vector<std::vector<std::string>>& rows,
                       std::size_t text_columns) {
  if (rows.empty()) return "";
  const auto cells = [&](const std::vector<std::string>& row, const char* tag) {
    std::string out = "<tr>";
    for (std::size_t i = 0; i < row.size(); ++i)
      out += fmt::format("<{0}{1}>{2}</{0}>", tag, i < text_columns ? "" : " class=\"n\"",
                         escape_html(row[i]));
    return out + "</tr>\n";
  };
  std::string out =
      "<div class=\"scroll\"><table>\n<thead>" + cells(head, "th") + "</thead>\n<tbody>\n";
  for (const auto& row : rows) out += cells(row, "td");
  return out + "</tbody>\n</table></div>\n";
}

std::string html_settings(const std::vector<Headline>& settings) {
  std::string out;
  for (const Headline& s : settings)
    if (!s.value.empty())
      out += fmt::format("<div><dt>{}</dt><dd>{}</dd></div>\n", escape_html(s.label),
                         escape_html(s.value));
  return out.empty() ? "" : "<dl>\n" + out + "</dl>\n";
}

}  // namespace lockstep::loop
