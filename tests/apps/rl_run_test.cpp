// Whole runs of the binary: what metrics.jsonl holds, that policy and rollout agree to the bit in
// every mode, and that nothing about the machine or the batch shows in the figures.
#include <algorithm>
#include <cmath>
#include <set>

#include "apps/tiny_run.h"
#include "loop/checkpoint_store.h"

namespace lockstep {
namespace {

using RlRun = TinyRunTest;

void expect_finite(const loop::RunData& run) {
  ASSERT_FALSE(run.rows.empty()) << run.name;
  for (const loop::MetricsRow& row : run.rows)
    for (const std::string& name : loop::non_finite_metrics(row.values))
      ADD_FAILURE() << run.name << " step " << row.step << ": " << name << " is not finite";
}

TEST_F(RlRun, EveryRowHoldsTheMetricsThatTheDocumentNames) {
  const loop::RunData run = done("a", {"checkpointing.enabled=true"});
  ASSERT_EQ(run.rows.size(), 3u);
  expect_lockstep(run);
  expect_finite(run);
  for (std::size_t i = 0; i < run.rows.size(); ++i) {
    const loop::MetricsRow& row = run.rows[i];
    EXPECT_EQ(row.step, static_cast<std::int64_t>(i) + 1);
    for (const char* name :
         {"train/reward", "train/loss", "train/grad_norm", "train/token_mult_prob_error",
          "train/gen_kl_error", "train/policy_kl_error", "train/sampling_importance_ratio",
          "train/approx_entropy", "timing/train/generation", "timing/train/policy_training",
          "timing/train/total_step_time", "performance/tokens_per_sec", "fp8/weights/saturated",
          "fp8/forward/expert_input/amax_max", "fp8/gradient/expert_input/flushed_to_zero",
          "moe/load_cv"}) {
      ASSERT_TRUE(row.values.count(name)) << name;
      EXPECT_TRUE(std::holds_alternative<double>(row.values.at(name))) << name;
    }
    for (const char* name : {"train/logprobs_compared", "train/logprobs_different",
                             "train/optimizer_steps", "rollout/preemptions"}) {
      ASSERT_TRUE(row.values.count(name)) << name;
      EXPECT_TRUE(std::holds_alternative<std::int64_t>(row.values.at(name))) << name;
    }
    const std::string checksum = std::get<std::string>(row.values.at("sync/weight_checksum"));
    EXPECT_EQ(checksum.size(), 32u);
    EXPECT_EQ(checksum.find_first_not_of("0123456789abcdef"), std::string::npos) << checksum;
    EXPECT_EQ(row.values.count("validation/accuracy"), 1u);  // start, 2nd, last
    EXPECT_GT(std::get<double>(row.values.at("train/grad_norm")), 0);
  }
  const auto sums = checksums(run);
  EXPECT_EQ(std::set<std::string>(sums.begin(), sums.end()).size(), 3u);  // each step moved them
  std::size_t lines = 0;
  for (const char c : slurp(dir / "a" / "rollouts" / "train_data_step3.jsonl")) lines += c == '\n';
  EXPECT_EQ(lines, 16u);
  EXPECT_TRUE(std::filesystem::exists(dir / "a" / "report.html"));
}

TEST_F(RlRun, OnAPipeThereIsOneLineAStepAndNoBar) {
  const Outcome out = run(rl("a"));
  ASSERT_EQ(out.code, 0) << out.text;
  EXPECT_EQ(out.text.find('\r'), std::string::npos);
  EXPECT_EQ(out.text.find('\x1b'), std::string::npos);
  std::size_t lines = 0;
  for (std::size_t at = 0; (at = out.text.find("\nstep ", at)) != std::string::npos; ++at) ++lines;
  EXPECT_EQ(lines, 3u) << out.text;
  EXPECT_EQ(out.text.rfind("model    ", 0), 0u) << out.text;  // what runs, in a few lines
  EXPECT_LE(std::count(out.text.begin(), out.text.end(), '\n'), 14) << out.text;
  EXPECT_TRUE(holds(out.text, ": 0 of ")) << out.text;
  EXPECT_TRUE(holds(out.text, (dir / "a" / "report.html").string())) << out.text;
}

TEST_F(RlRun, PreemptionAndChunkedPrefillChangeNothing) {
  const loop::RunData roomy = done("roomy");
  // 24 pages hold one sequence of 48 tokens, or parts of several.
  const loop::RunData tight =
      done("tight", {"policy.generation.block_size=2", "policy.generation.num_blocks=24",
                     "policy.generation.max_num_batched_tokens=10"});
  ASSERT_EQ(tight.rows.size(), 3u);
  EXPECT_EQ(loop::sum_values(roomy, "rollout/preemptions"), 0);
  EXPECT_GT(loop::sum_values(tight, "rollout/preemptions"), 0);
  const double prompt_tokens = values(tight, "train/total_num_tokens")[0] / 16 -
                               values(tight, "train/mean_gen_tokens_per_sample")[0];
  EXPECT_GT(prompt_tokens, 10);  // more than one forward takes
  expect_lockstep(tight);
  expect_equal(roomy, tight, "rollout/");
}

TEST_F(RlRun, HowItIsComputedChangesNothing) {
  const loop::RunData plain = done("plain");
  expect_equal(plain, done("again"));
  expect_equal(plain, done("recompute", {"policy.activation_checkpointing=true"}));
  expect_equal(plain, done("two_threads", {"num_threads=2"}));
  expect_equal(plain, done("scored_alone", {"policy.logprob_batch_size=1"}));
  expect_equal(plain,
               done("one_by_one", {"policy.generation.max_num_seqs=1",
                                   "policy.generation.enable_prefix_sharing=false",
                                   "policy.generation.block_size=3"}),
               "rollout/");
  expect_equal(plain, done("unseen", {"logger.log_rollouts=false", "checkpointing.enabled=true",
                                      "logger.tensorboard_enabled=false"}));
}

// Pages of latent vectors, shared experts and a group-limited router through the whole loop; the
// rewards differ, so that weights move.
TEST_F(RlRun, DeepseekV3) {
  const Words deepseek = {"policy.model_name=" LOCKSTEP_TEST_DATA "/hf/deepseek_v3",
                          "policy.tokenizer.name=" LOCKSTEP_SOURCE_DIR "/models/demo",
                          "env.reward=regex", "env.pattern='[a-m]'",
                          "policy.generation.num_blocks=60"};
  const loop::RunData run = done("a", deepseek);
  expect_lockstep(run);
  expect_finite(run);
  const auto sums = checksums(run);
  EXPECT_EQ(std::set<std::string>(sums.begin(), sums.end()).size(), 3u);
  for (const double norm : values(run, "train/grad_norm")) EXPECT_GT(norm, 0);
  Words again = deepseek;
  again.insert(again.end(), {"policy.activation_checkpointing=true", "num_threads=2",
                             "policy.generation.block_size=3", "policy.generation.num_blocks=200"});
  expect_equal(run, done("again", again), "rollout/");
}

TEST_F(RlRun, WithoutANumberOfThreadsOpenMpsIsTaken) {
  const Words few = {"num_threads=0", "grpo.max_num_steps=1"};
  const Outcome one = run(rl("one", few), {"OMP_NUM_THREADS=1"});
  // The reason for the CPU may follow in brackets.
  EXPECT_TRUE(holds(one.text, " 1 thread;") || holds(one.text, " 1 thread (")) << one.text;
  const Outcome two = run(rl("two", few), {"OMP_NUM_THREADS=2"});
  EXPECT_TRUE(holds(two.text, " 2 threads;") || holds(two.text, " 2 threads (")) << two.text;
}

TEST_F(RlRun, InstructionSetsAgree) {
  const Words few = {"grpo.max_num_steps=2", "grpo.num_prompts_per_step=2", "grpo.val_period=0",
                     "grpo.max_val_samples=2"};
  const loop::RunData best = done("best", few);
  Words others = {"portable"};
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) others.push_back("avx2");
#endif
  for (const std::string& isa : others)
    expect_equal(best, done(isa, few, {"LOCKSTEP_CPU_ISA=" + isa}));
}

TEST_F(RlRun, SeveralUpdatesOfOneRollout) {
  const Words four = {"policy.train_global_batch_size=4", "policy.train_micro_batch_size=3"};
  const loop::RunData run = done("four", four);
  expect_lockstep(run);
  expect_finite(run);
  EXPECT_EQ(values(run, "train/optimizer_steps"), std::vector<double>(3, 4.0));
  // All samples are verified before the first update, not only those of the first update.
  for (std::size_t i = 0; i < 3; ++i)
    EXPECT_EQ(values(run, "train/logprobs_compared")[i],
              values(run, "train/mean_gen_tokens_per_sample")[i] * 16);
  // From the second update on the ratio is no identity.
  EXPECT_NE(values(run, "train/probs_ratio_max"), std::vector<double>(3, 1.0));
  // Verifying less often compares less and changes no weight.
  Words rarely = four;
  rarely.push_back("grpo.verify_every=2");
  const loop::RunData other = done("rarely", rarely);
  EXPECT_EQ(checksums(run), checksums(other));
  EXPECT_LT(values(other, "train/logprobs_compared")[0], values(run, "train/logprobs_compared")[0]);
  EXPECT_EQ(values(other, "train/logprobs_compared")[1], values(run, "train/logprobs_compared")[1]);
}

TEST_F(RlRun, EveryEstimatorAndLossRuns) {
  const Words on_policy[] = {
      {"grpo.adv_estimator.name=grpo"},
      {"grpo.adv_estimator.name=dr_grpo"},
      {"grpo.adv_estimator.name=rloo"},
      {"grpo.adv_estimator.name=dapo", "grpo.dynamic_sampling_max_gen_batches=3"},
      {"grpo.adv_estimator.name=gspo"},
      {"grpo.adv_estimator.name=cispo"},
      {"loss_fn.reference_policy_kl_penalty=0.1", "loss_fn.reference_policy_kl_type=k1"},
      {"loss_fn.reference_policy_kl_penalty=0.1", "loss_fn.reference_policy_kl_type=k2"},
      {"loss_fn.reference_policy_kl_penalty=0.1", "loss_fn.reference_policy_kl_type=k3"},
      {"loss_fn.ratio_clip_c=3"},
      {"loss_fn.force_on_policy_ratio=true"},
      {"loss_fn.loss_agg=seq-mean"},
      {"loss_fn.loss_agg=seq-sum-const"},
      {"grpo.overlong_filtering=true", "grpo.reward_shaping.enabled=true",
       "grpo.reward_shaping.overlong_buffer_length=4"},
      {"policy.moe.aux_loss_coeff=0.01", "policy.moe.bias_update_rate=0.001"},
      {"policy.optimizer.moment_dtype=bf16", "policy.scheduler.name=cosine"},
  };
  int i = 0;
  for (Words more : on_policy) {
    const bool once = more[0] == "loss_fn.force_on_policy_ratio=true";
    for (const char* word :
         {"grpo.max_num_steps=2", "grpo.max_val_samples=2", "checkpointing.enabled=false"})
      more.push_back(word);
    if (!once) more.push_back("policy.train_global_batch_size=8");
    SCOPED_TRACE(joined(more));
    const loop::RunData run = done("run" + std::to_string(i++), more);
    expect_lockstep(run);
    expect_finite(run);
  }
}

TEST_F(RlRun, DynamicSamplingCountsTheGroupsOfAllBatches) {
  // One token is never a right answer: all batches are drawn and every group of them is dropped.
  const loop::RunData run =
      done("a", {"grpo.adv_estimator.name=dapo", "grpo.dynamic_sampling_max_gen_batches=3",
                 "policy.generation.max_new_tokens=1"});
  for (const double batches : values(run, "train/generation_batches")) EXPECT_EQ(batches, 3);
  for (const double dropped : values(run, "train/groups_dropped")) EXPECT_EQ(dropped, 12);
}

TEST_F(RlRun, ACheckpointOfWeightsThatAreNotFiniteIsMarkedAndNotResumedFrom) {
  const Words more = {"policy.optimizer.lr=1e300", "grpo.max_num_steps=1", "grpo.val_period=0",
                      "checkpointing.enabled=true"};
  ASSERT_EQ(run(rl("a", more)).code, 0);
  const std::filesystem::path saved = dir / "a" / "checkpoints" / "step_1";
  EXPECT_TRUE(loop::verify_checkpoint(saved).empty());
  const loop::FoundCheckpoint found = loop::find_latest_valid(saved.parent_path());
  EXPECT_FALSE(found.folder);
  ASSERT_EQ(found.problems.size(), 1u);
  EXPECT_TRUE(holds(found.problems[0], "unhealthy")) << found.problems[0];
}

TEST_F(RlRun, TheRolloutsFiguresLeaveEvaluationOut) {
  Words never = {"policy.generation.num_blocks=6", "policy.generation.max_num_seqs=8",
                 "policy.generation.temperature=4", "policy.generation.max_new_tokens=30"};
  Words often = never;
  never.push_back("grpo.val_period=0"), never.push_back("grpo.val_at_start=false");
  often.push_back("grpo.val_period=1");
  const auto preemptions = [&](const char* name, const Words& more) {
    return values(done(name, more), "rollout/preemptions");
  };
  const auto want = preemptions("never", never);
  ASSERT_EQ(want.size(), 3u);
  EXPECT_GT(want[0], 0);
  EXPECT_EQ(preemptions("often", often), want);
}

TEST_F(RlRun, FilteredSamplingKeepsLockstep) {
  const Words filters[] = {{"policy.generation.temperature=0.7"},
                           {"policy.generation.temperature=1.5", "policy.generation.top_k=5"},
                           {"policy.generation.top_p=0.9"},
                           {"policy.generation.min_p=0.05"},
                           {"policy.generation.temperature=1.3", "policy.generation.top_k=20",
                            "policy.generation.top_p=0.95", "policy.generation.min_p=0.01"}};
  int i = 0;
  for (Words more : filters) {
    SCOPED_TRACE(joined(more));
    const loop::RunData run = done("run" + std::to_string(i++), more);
    expect_lockstep(run);
    expect_finite(run);
  }
}

TEST_F(RlRun, EveryPrecisionKeepsLockstep) {
  const Words precisions[] = {{"policy.precision=bf16"},
                              {"policy.fp8_cfg.recipe=rowwise"},
                              {"policy.fp8_cfg.recipe=tensorwise"},
                              {"policy.fp8_cfg.use_weight_pow2_scale=true",
                               "policy.fp8_cfg.use_activation_pow2_scale=true"},
                              {"policy.fp8_cfg.num_first_layers_in_bf16=1"},
                              {"policy.fp8_cfg.num_last_layers_in_bf16=1"}};
  std::set<std::string> seen;
  int i = 0;
  for (Words more : precisions) {
    SCOPED_TRACE(joined(more));
    const loop::RunData run = done("run" + std::to_string(i++), more);
    expect_lockstep(run);
    expect_finite(run);
    for (const std::string& sum : checksums(run)) seen.insert(sum);
  }
  EXPECT_EQ(seen.size(), 6u * 3u);  // each setting is in effect
}

// The measuring device works: two precisions show in the same metrics, and corrections for it run.
TEST_F(RlRun, PrecisionsApartShowAsMismatch) {
  const Words apart = {"policy.precision=bf16", "policy.generation.precision=fp8"};
  const Words bounds = {"loss_fn.use_importance_sampling_correction=true",
                        "loss_fn.truncated_importance_sampling_ratio=2",
                        "loss_fn.truncated_importance_sampling_ratio_min=0.5"};
  for (const std::string type : {"none", "off", "tis", "icepop", "seq-mask-tis"}) {
    Words more = apart;
    if (type != "none") {
      more.push_back("loss_fn.truncated_importance_sampling_type=" + type);
      more.push_back(bounds[0]);
      if (type != "off") more.push_back(bounds[1]);
      if (type == "icepop" || type == "seq-mask-tis") more.push_back(bounds[2]);
    }
    SCOPED_TRACE(type);
    const loop::RunData run = done("run_" + type, more);
    expect_finite(run);
    ASSERT_EQ(run.rows.size(), 3u);
    for (std::size_t i = 0; i < 3; ++i) {
      EXPECT_GT(values(run, "train/token_mult_prob_error")[i], 1.001);
      EXPECT_GT(values(run, "train/gen_kl_error")[i], 0);
      EXPECT_GT(values(run, "train/logprobs_different")[i],
                values(run, "train/logprobs_compared")[i] / 2);
    }
  }
}

TEST_F(RlRun, AFileOfPromptsEndsAfterItsEpochs) {
  std::string text;
  for (int i = 0; i < 8; ++i)
    text += R"({"prompt": "reverse abc=", "label": "cba"})"
            "\n";
  put("train.jsonl", text);
  const Words file = {
      "data.train.task=null",       "data.train.data_path=" + (dir / "train.jsonl").string(),
      "grpo.max_num_epochs=2",      "grpo.max_num_steps=50",
      "checkpointing.enabled=true", "checkpointing.save_period=100"};
  const loop::RunData run = done("file", file);
  EXPECT_EQ(run.rows.size(), 4u);  // 2 passes over 8 prompts, 4 a step
  ASSERT_FALSE(run.rows.empty());
  EXPECT_EQ(run.rows.back().values.count("validation/accuracy"), 1u);
  EXPECT_TRUE(std::filesystem::exists(dir / "file" / "checkpoints" / "step_4"));
}

}  // namespace
}  // namespace lockstep
