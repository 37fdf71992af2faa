// The frame of a report: one HTML file with its style sheet inside. Used by report.cpp and
// report_comparison.cpp.
#pragma once

#include <string>
#include <vector>

namespace lockstep::loop {

// <!doctype html> ... </html> around `body`, which is HTML already.
std::string html_page(const std::string& title, const std::string& body);

// <section> with a heading; "" when `content` is empty, so that what a run does not have leaves no
// hole.
std::string html_section(const std::string& heading, const std::string& content);

struct Headline {
  std::string value, label;
};
// The row of large numbers; entries with an empty value are left out.
std::string html_headlines(const std::vector<Headline>& headlines);

// Cells are plain text and are escaped here. Numbers stand right-aligned in all columns but the
// first `text_columns`.
std::string html_table(const std::vector<std::string>& head,
                       const std::vector<std::vector<std::string>>& rows,
                       std::size_t text_columns = 1);

// Definition list of short settings, escaped.
std::string html_settings(const std::vector<Headline>& settings);

}  // namespace lockstep::loop
