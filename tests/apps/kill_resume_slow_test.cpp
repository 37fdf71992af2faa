// A run that was killed, however and whenever, and resumed is the run that was never disturbed: the
// same metrics in every step and the same weights, to the bit.
#include <algorithm>
#include <random>

#include "apps/tiny_run.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;

struct KillResume : TinyRunTest {
  const Words saving = {"checkpointing.enabled=true", "checkpointing.keep_top_k=1"};

  static Words plus(Words a, const Words& b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
  }
  Words steps(const std::string& name, int n, const Words& more = {}) const {
    return rl(name, plus(plus(saving, more), {"grpo.max_num_steps=" + std::to_string(n)}));
  }
  loop::RunData undisturbed(int n) const {
    const Outcome out = run(steps("undisturbed", n));
    EXPECT_EQ(out.code, 0) << out.text;
    return loop::read_run(dir / "undisturbed");
  }
};

TEST_F(KillResume, KilledAtRandomMoments) {
  const auto start = std::chrono::steady_clock::now();
  const loop::RunData whole = undisturbed(6);
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::mt19937 random(std::random_device{}());
  std::uniform_real_distribution<double> moment(0, std::min(0.9 * seconds, 3.0));
  int killed = 0;
  for (int attempt = 0; attempt < 6; ++attempt) {
    const double after = moment(random);
    Process process(steps("killed", 6, {"--resume", "auto"}), dir / "output.txt");
    std::this_thread::sleep_for(std::chrono::duration<double>(after));
    if (!process.running()) break;  // done before its time
    process.send(SIGKILL);
    EXPECT_EQ(process.wait().code, 128 + SIGKILL) << after;
    ++killed;
  }
  EXPECT_GT(killed, 0);
  const Outcome out = run(steps("killed", 6, {"--resume", "auto"}));
  ASSERT_EQ(out.code, 0) << out.text;
  expect_equal(whole, loop::read_run(dir / "killed"));
  EXPECT_EQ(slurp(dir / "undisturbed/checkpoints/step_6/policy/optimizer.safetensors"),
            slurp(dir / "killed/checkpoints/step_6/policy/optimizer.safetensors"));
}

TEST_F(KillResume, KilledAtEveryPointOfASave) {
  const loop::RunData whole = undisturbed(5);
  ASSERT_EQ(run(steps("two", 2)).code, 0);
  for (const char* point :
       {"save.begin", "save.after_files", "save.after_sync", "save.after_manifest",
        "save.after_rename", "save.after_latest", "save.in_retention"}) {
    SCOPED_TRACE(point);
    fs::copy(dir / "two", dir / point, fs::copy_options::recursive);
    const Outcome killed =
        run(steps(point, 5, {"--resume", "auto"}), {std::string("LOCKSTEP_FAILPOINT=") + point});
    EXPECT_EQ(killed.code, 128 + SIGKILL) << killed.text;  // in the save of step 4
    const Outcome out = run(steps(point, 5, {"--resume", "auto"}));
    ASSERT_EQ(out.code, 0) << out.text;
    EXPECT_TRUE(holds(out.text, "resuming after step 2") ||
                holds(out.text, "resuming after step 4"))
        << out.text;
    expect_equal(whole, loop::read_run(dir / point));
    for (const auto& entry : fs::directory_iterator(dir / point / "checkpoints"))
      EXPECT_FALSE(holds(entry.path().filename().string(), "tmp_")) << entry.path();
  }
}

TEST_F(KillResume, InterruptsSaveAndEndWithCode130) {
  const loop::RunData whole = undisturbed(8);
  for (const int signal : {SIGINT, SIGTERM}) {
    const std::string name = "signal" + std::to_string(signal);
    SCOPED_TRACE(name);
    Process process(steps(name, 8, {"checkpointing.save_period=100"}), dir / "output.txt");
    while (process.running() && slurp(dir / name / "metrics.jsonl").empty())
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    process.send(signal);
    const Outcome out = process.wait();
    EXPECT_EQ(out.code, 130) << out.text;
    EXPECT_TRUE(holds(out.text, "resumable with --resume auto")) << out.text;
    const loop::RunData part = loop::read_run(dir / name);
    ASSERT_LT(part.rows.size(), 8u);
    EXPECT_TRUE(
        fs::exists(dir / name / "checkpoints" / ("step_" + std::to_string(part.rows.back().step))));
    const Outcome rest = run(steps(name, 8, {"--resume", "auto"}));
    ASSERT_EQ(rest.code, 0) << rest.text;
    EXPECT_TRUE(holds(rest.text, "after step " + std::to_string(part.rows.back().step)));
    expect_equal(whole, loop::read_run(dir / name));
  }
}

TEST_F(KillResume, TheSummaryCoversTheStepsBeforeTheResume) {
  const Outcome whole = run(steps("undisturbed", 4));
  ASSERT_EQ(run(steps("parts", 2)).code, 0);
  const Outcome rest = run(steps("parts", 4, {"--resume", "auto"}));
  const auto line = [](const std::string& text, const std::string& start) {
    const std::size_t at = text.find(start);
    return at == std::string::npos ? start + " missing" : text.substr(at, text.find('\n', at) - at);
  };
  for (const char* start : {"held-out accuracy", "policy against rollout"})
    EXPECT_EQ(line(whole.text, start), line(rest.text, start));
}

}  // namespace
}  // namespace lockstep
