#include "loop/report.h"

#include <gtest/gtest.h>

#include <regex>

#include "base/error.h"
#include "loop/chart.h"
#include "loop/report_run.h"
#include "loop/temp_dir.h"

namespace lockstep::loop {
namespace {

// "" when every tag that opens also closes, in order; else what is wrong.
std::string unbalanced(const std::string& html) {
  std::vector<std::string> open;
  const std::regex tag("<(/?)([a-zA-Z][a-zA-Z0-9]*)((?:\"[^\"]*\"|[^\">])*?)(/?)>");
  for (auto it = std::sregex_iterator(html.begin(), html.end(), tag); it != std::sregex_iterator();
       ++it) {
    const std::string name = (*it)[2];
    if ((*it)[1].length() == 0) {
      if ((*it)[4].length() == 0 && name != "meta" && name != "br") open.push_back(name);
    } else if (open.empty() || open.back() != name) {
      return "</" + name + "> closes " + (open.empty() ? "nothing" : open.back());
    } else {
      open.pop_back();
    }
  }
  return open.empty() ? "" : "<" + open.back() + "> stays open";
}

// Non-finite numbers in attributes or in text.
bool shows_nan(const std::string& html) {
  return std::regex_search(html, std::regex("[\" >ML-](nan|inf)\\b", std::regex::icase));
}

bool holds(const std::string& html, const std::string& part) {
  return html.find(part) != std::string::npos;
}

using Report = TempDirTest;

TEST_F(Report, ShowsCurvesHeadlinesAndEscapedSamples) {
  write_rl_run(dir / "run", 30);
  const std::string html = slurp(write_report(dir / "run"));
  EXPECT_EQ(unbalanced(html), "");
  EXPECT_FALSE(shows_nan(html));
  EXPECT_TRUE(holds(html, "0.250 → 0.750"));
  EXPECT_TRUE(holds(html, "0 of 30,000"));
  for (const char* part : {"held-out accuracy", "Gradient norm", "token_mult_prob_error",
                           "gen_kl_error", "FP8 health", "Unevenness", "Time of a step",
                           "1 value not finite, left out", "1 malformed lines left out"})
    EXPECT_TRUE(holds(html, part)) << part;
  EXPECT_TRUE(holds(html, "sort &lt;b&gt; &amp; &#39;x&#39;"));
  EXPECT_TRUE(holds(html, "&lt;/td&gt;&lt;script&gt;alert(1)&lt;/script&gt;&#x2401;"));
  EXPECT_FALSE(holds(html, "<script"));
  EXPECT_FALSE(std::regex_search(html, std::regex("(src|href)=|url\\(|@import")))
      << "something from outside the file";
}

TEST_F(Report, OneStepNoStepAndNoConfigGiveWholePages) {
  write_rl_run(dir / "one", 1);
  write_rl_run(dir / "none", 0);
  std::filesystem::create_directories(dir / "bare");
  put("bare/metrics.jsonl", "{\"step\": 1, \"train/loss\": null}\n");
  for (const char* name : {"one", "none", "bare"}) {
    const std::string html = slurp(write_report(dir / name));
    EXPECT_EQ(unbalanced(html), "") << name;
    EXPECT_FALSE(shows_nan(html)) << name;
  }
}

TEST_F(Report, PretrainingHasItsLosses) {
  std::filesystem::create_directories(dir / "run");
  put("run/metrics.jsonl",
      "{\"step\": 1, \"train/loss\": 5.5}\n"
      "{\"step\": 2, \"train/loss\": 2.5, \"validation/loss\": 2.25}\n");
  const std::string html = slurp(write_report(dir / "run"));
  EXPECT_TRUE(holds(html, "Pretraining"));
  EXPECT_TRUE(holds(html, "5.500 → 2.500"));
  EXPECT_TRUE(holds(html, "2.250"));
  EXPECT_FALSE(holds(html, "Policy against rollout"));
}

TEST_F(Report, NoRunIsAnInputErrorThatNamesTheFolder) {
  try {
    write_report(dir / "absent");
    FAIL();
  } catch (const base::InputError& e) {
    EXPECT_TRUE(holds(e.what(), (dir / "absent").string()));
  }
}

TEST_F(Report, ComparisonHasEveryRunInEveryChart) {
  write_rl_run(dir / "left", 20);
  write_rl_run(dir / "right", 12, 0.25);
  write_comparison({dir / "left", dir / "right"}, dir / "out.html");
  const std::string html = slurp(dir / "out.html");
  EXPECT_EQ(unbalanced(html), "");
  EXPECT_FALSE(shows_nan(html));
  EXPECT_TRUE(holds(html, "gap of right"));
  EXPECT_TRUE(holds(html, "left, step 20"));
  EXPECT_TRUE(holds(html, "right, step 12"));
  EXPECT_THROW(write_comparison({dir / "left"}, dir / "one.html"), base::InputError);
}

TEST(Chart, PathRisesWithItsValuesAndBreaksAtNan) {
  const std::string svg =
      line_chart({"t", "", "", {{"s", {{1, 0}, {2, 1}, {3, std::nan("")}, {4, 2}}}}});
  std::smatch path;
  ASSERT_TRUE(std::regex_search(
      svg, path, std::regex("d=\"M([0-9.]+) ([0-9.]+)L([0-9.]+) ([0-9.]+)M([0-9.]+) ([0-9.]+)\"")));
  EXPECT_LT(std::stod(path[1]), std::stod(path[3]));
  EXPECT_LT(std::stod(path[3]), std::stod(path[5]));
  EXPECT_GT(std::stod(path[2]), std::stod(path[4]));
  EXPECT_NEAR(std::stod(path[2]) - std::stod(path[4]), std::stod(path[4]) - std::stod(path[6]),
              0.2);
}

TEST(Chart, WideRangesGetPowersOfTenAndZeroItsOwnLine) {
  const std::string svg =
      line_chart({"t", "", "", {{"s", {{1, 1e-6}, {2, 0}, {3, 1.0}}}}, Axis::kLogWhenWide});
  EXPECT_TRUE(holds(svg, ">1e-06<"));
  EXPECT_TRUE(holds(svg, ">0<"));
  EXPECT_TRUE(holds(svg, ">1<"));
}

TEST(Chart, LongSeriesAreThinnedButKeepTheirExtremes) {
  Series s{"s", {}};
  for (int i = 0; i < 100000; ++i) s.points.push_back({double(i), i == 54321 ? 1000.0 : 1.0});
  const std::string svg = line_chart({"t", "", "", {s}});
  EXPECT_LT(svg.size(), 60000u);
  EXPECT_TRUE(std::regex_search(svg, std::regex("L[0-9.]+ (1[0-9]|2[0-9])\\.[0-9]"))) << "lost";
}

TEST(Chart, NumbersAreShortAndNeverNan) {
  EXPECT_EQ(number_text(0), "0");
  EXPECT_EQ(number_text(-1234567), "-1,234,567");
  EXPECT_EQ(number_text(0.031249), "0.03125");
  EXPECT_EQ(number_text(1.2345e-9), "1.234e-09");
  EXPECT_EQ(number_text(std::nan("")), "–");
}

}  // namespace
}  // namespace lockstep::loop
