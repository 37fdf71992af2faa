// The scheduler without a model. A shadow cache stands for the keys and values: each row holds a
// hash of the tokens up to its position, so that a page that is lost, doubly owned, copied too late
// or overwritten shows up as a wrong hash.
#include "rollout/scheduler.h"

#include <gtest/gtest.h>

#include <deque>
#include <random>

#include "base/error.h"

namespace lockstep::rollout {
namespace {

std::uint64_t prefix_hash(const Sequence& s, std::int64_t position) {
  std::uint64_t hash = 7;
  for (std::int64_t i = 0; i <= position; ++i)
    hash = (hash ^ static_cast<std::uint64_t>(s.tokens[i] + 1)) * 0x100000001B3ull;
  return hash;
}

struct Harness {
  explicit Harness(const Options& o)
      : options(o), scheduler(o), cache(o.num_blocks * o.block_size, 0) {}

  Sequence& add(std::vector<std::int32_t> prompt, std::int64_t new_tokens) {
    Sequence& s = sequences.emplace_back();
    s.id = static_cast<std::int64_t>(sequences.size());
    s.request.prompt = s.tokens = std::move(prompt);
    s.prompt_length = s.length();
    s.max_length = s.prompt_length + new_tokens;
    scheduler.add(s);
    return s;
  }

  // One step; samples tokens that depend on the sequence alone. Returns the plan's tokens.
  std::int64_t step() {
    scheduler.schedule(plan);
    check_plan();
    for (const PageCopy& c : plan.copies)
      for (std::int64_t row = 0; row < c.rows; ++row)
        cache[c.target * options.block_size + row] = cache[c.source * options.block_size + row];
    for (const StepItem& item : plan.items) run_item(item);
    scheduler.commit(plan);
    for (const Draw& draw : plan.draws) {
      Sequence& s = *draw.sequence;
      s.tokens.push_back(static_cast<std::int32_t>((s.id * 31 + s.length() * 17) % 97));
      if (s.length() == s.max_length || end_early(s)) {
        scheduler.finish(s);
        ++finished;
      }
    }
    check_pages();
    return plan.tokens;
  }

  bool end_early(const Sequence& s) const {
    return early_ends && (s.id * 7 + s.length() * 5) % 11 == 0;
  }

  void run_item(const StepItem& item) {
    const Sequence& s = *item.sequence;
    ASSERT_EQ(item.begin, s.computed);
    ASSERT_LE(item.begin + item.count, s.length());
    for (std::int64_t i = 0; i < item.begin; ++i)
      ASSERT_EQ(cache[cache_row(s, i, options.block_size)], prefix_hash(s, i))
          << "sequence " << s.id << " position " << i;
    for (std::int64_t i = item.begin; i < item.begin + item.count; ++i) {
      ASSERT_EQ(scheduler.pages().holders(s.pages[i / options.block_size]), 1);
      cache[cache_row(s, i, options.block_size)] = prefix_hash(s, i);
    }
  }

  void check_plan() {
    std::int64_t tokens = 0;
    std::set<const Sequence*> seen;
    for (const StepItem& item : plan.items) {
      tokens += item.count;
      ASSERT_GE(item.count, 1);
      ASSERT_TRUE(seen.insert(item.sequence).second);
      ASSERT_EQ(item.sequence->status, Status::kRunning);
      ASSERT_TRUE(options.prefill_chunk == 0 || item.count <= options.prefill_chunk);
    }
    ASSERT_EQ(tokens, plan.tokens);
    ASSERT_LE(tokens, options.max_num_batched_tokens);
    ASSERT_LE(plan.items.size(), static_cast<std::size_t>(options.max_num_seqs));
    ASSERT_LE(scheduler.running(), options.max_num_seqs);
    ASSERT_TRUE(tokens > 0 || scheduler.unfinished() == 0) << "no progress";
    std::set<const Sequence*> drawn;
    for (const Draw& d : plan.draws) ASSERT_TRUE(drawn.insert(d.sequence).second);
  }

  // Every page is held exactly by the sequences that list it.
  void check_pages() {
    std::vector<int> holders(options.num_blocks, 0);
    for (const Sequence& s : sequences)
      for (const std::int32_t page : s.pages) ++holders[page];
    std::int64_t free = 0;
    for (std::int64_t page = 0; page < options.num_blocks; ++page) {
      ASSERT_EQ(holders[page], scheduler.pages().holders(static_cast<std::int32_t>(page)));
      free += holders[page] == 0;
    }
    ASSERT_EQ(free, scheduler.pages().free_count());
  }

  int run_all(int limit = 100000) {
    int steps = 0;
    while (scheduler.unfinished() > 0 && steps < limit && !testing::Test::HasFatalFailure()) {
      step();
      ++steps;
    }
    EXPECT_EQ(scheduler.unfinished(), 0);
    EXPECT_EQ(scheduler.pages().free_count(), options.num_blocks);
    return steps;
  }

  Options options;
  Scheduler scheduler;
  std::vector<std::uint64_t> cache;
  std::deque<Sequence> sequences;
  StepPlan plan;
  int finished = 0;
  bool early_ends = false;
};

Options small(int seqs, int block, std::int64_t blocks, int budget) {
  Options o;
  o.max_num_seqs = seqs;
  o.block_size = block;
  o.num_blocks = blocks;
  o.max_num_batched_tokens = budget;
  return o;
}

std::vector<std::int32_t> iota(int n, int from = 0) {
  std::vector<std::int32_t> out(n);
  for (int i = 0; i < n; ++i) out[i] = from + i;
  return out;
}

TEST(Scheduler, OnePromptIsComputedOnceAndItsLastPageCopied) {
  Harness h(small(8, 4, 64, 100));
  for (int i = 0; i < 4; ++i) h.add(iota(10), 5);
  EXPECT_EQ(h.step(), 10);  // the leader alone
  EXPECT_EQ(h.plan.draws.size(), 4u);
  for (const Sequence& s : h.sequences) EXPECT_EQ(s.response_length(), 1);
  EXPECT_EQ(h.step(), 4);
  EXPECT_EQ(h.plan.copies.size(), 3u);  // the last holder writes in place
  for (const PageCopy& c : h.plan.copies) EXPECT_EQ(c.rows, 2);
  EXPECT_EQ(h.scheduler.stats().shared_tokens, 30);
  EXPECT_EQ(h.sequences[0].pages[0], h.sequences[3].pages[0]);
  EXPECT_NE(h.sequences[0].pages[2], h.sequences[3].pages[2]);
  h.run_all();
  EXPECT_EQ(h.finished, 4);
}

TEST(Scheduler, FullPagesNeedNoCopy) {
  Harness h(small(8, 5, 64, 100));
  for (int i = 0; i < 3; ++i) h.add(iota(10), 5);
  h.run_all();
  EXPECT_EQ(h.scheduler.stats().page_copies, 0);
  EXPECT_EQ(h.scheduler.stats().shared_tokens, 20);
}

TEST(Scheduler, WithoutSharingEachComputesItsPrompt) {
  Options o = small(8, 4, 64, 100);
  o.enable_prefix_sharing = false;
  Harness h(o);
  for (int i = 0; i < 4; ++i) h.add(iota(10), 5);
  EXPECT_EQ(h.step(), 40);
  h.run_all();
  EXPECT_EQ(h.scheduler.stats().shared_tokens, 0);
}

TEST(Scheduler, ChunksMixWithDecodes) {
  Options o = small(8, 4, 64, 6);
  Harness h(o);
  h.add(iota(2), 20);
  h.step();
  h.add(iota(17, 50), 3);
  EXPECT_EQ(h.step(), 6);  // one decode, five of the prompt
  ASSERT_EQ(h.plan.items.size(), 2u);
  EXPECT_EQ(h.plan.items[0].count, 1);
  EXPECT_EQ(h.plan.items[1].count, 5);
  EXPECT_EQ(h.plan.draws.size(), 1u);
  h.run_all();
}

TEST(Scheduler, PrefillChunkBoundsOneSequence) {
  Options o = small(8, 4, 64, 100);
  o.prefill_chunk = 3;
  Harness h(o);
  h.add(iota(7), 2);
  EXPECT_EQ(h.step(), 3);
  EXPECT_EQ(h.step(), 3);
  EXPECT_EQ(h.step(), 1);
  h.run_all();
}

TEST(Scheduler, TheLatestArrivalIsPreemptedAndKeepsItsTokens) {
  Harness h(small(8, 2, 6, 100));
  h.add(iota(3), 9);
  h.add(iota(3, 50), 9);
  while (h.scheduler.stats().preemptions == 0) h.step();
  EXPECT_EQ(h.sequences[0].status, Status::kRunning);
  EXPECT_EQ(h.sequences[1].status, Status::kWaiting);
  EXPECT_TRUE(h.sequences[1].pages.empty());
  EXPECT_EQ(h.sequences[1].computed, 0);
  EXPECT_GT(h.sequences[1].response_length(), 0);
  h.run_all();
  EXPECT_EQ(h.finished, 2);
}

TEST(Scheduler, SequencesThatWaitGiveUpSharedPagesLast) {
  // One place: the samples wait with their prompt's pages, which the running one then needs.
  Harness h(small(1, 2, 5, 100));
  for (int i = 0; i < 3; ++i) h.add(iota(5), 6);
  h.add(iota(3, 40), 7);
  h.run_all();
  EXPECT_EQ(h.finished, 4);
}

TEST(Scheduler, ALaterSampleSharesThePagesThatAreThere) {
  Harness h(small(8, 4, 64, 100));
  h.add(iota(10), 5);
  h.step();
  h.add(iota(10), 5);
  EXPECT_EQ(h.step(), 2);  // a decode, and the last token of the prompt for its logits
  EXPECT_EQ(h.scheduler.stats().shared_tokens, 9);
  h.run_all();
}

TEST(Scheduler, FinishInEveryState) {
  Options o = small(2, 4, 64, 4);
  Harness h(o);
  for (int i = 0; i < 4; ++i) h.add(iota(10), 5);
  h.step();
  h.scheduler.finish(h.sequences[0]);  // the leader in the middle of the prompt
  h.scheduler.finish(h.sequences[2]);  // waiting
  while (h.sequences[3].response_length() == 0) h.step();
  h.scheduler.finish(h.sequences[3]);
  h.check_pages();
  h.run_all();
  EXPECT_EQ(h.finished, 1);
}

TEST(Scheduler, RefusesWhatNeverFits) {
  Harness h(small(8, 4, 3, 100));
  EXPECT_EQ(h.scheduler.needed_pages(13), 3);
  EXPECT_THROW(h.add(iota(10), 4), base::ContractError);
  Harness fits(small(8, 4, 3, 100));
  fits.add(iota(10), 3);
  fits.run_all();
}

TEST(Scheduler, RandomStress) {
  std::int64_t preemptions = 0, copies = 0, shared = 0;
  for (unsigned seed = 1; seed <= 6000; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    const auto in = [&](int low, int high) {
      return low + static_cast<int>(random() % static_cast<unsigned>(high - low + 1));
    };
    Options o = small(in(1, 9), in(1, 7), in(1, 30), in(1, 20));
    o.prefill_chunk = in(0, 5);
    o.enable_prefix_sharing = in(0, 3) > 0;
    o.shuffle_pages = in(0, 1) * seed;
    Harness h(o);
    h.early_ends = in(0, 1) == 1;
    const std::int64_t capacity = o.num_blocks * o.block_size + 1;
    int added = 0, aborted = 0;
    const int total = in(1, 30);
    while ((added < total || h.scheduler.unfinished() > 0) && !HasFatalFailure()) {
      const int prompt = in(1, 12), fresh = in(1, 15), samples = in(1, 5), from = in(0, 2);
      if (added < total && in(0, 2) == 0 && prompt + fresh <= capacity)
        for (int i = 0; i < samples; ++i, ++added) h.add(iota(prompt, from), fresh);
      else if (prompt + fresh > capacity)
        ++added;
      if (in(0, 9) == 0)
        for (Sequence& s : h.sequences)
          if (s.status != Status::kFinished && in(0, 4) == 0) h.scheduler.finish(s), ++aborted;
      h.step();
      ASSERT_LT(h.sequences.size(), 1000u);
    }
    ASSERT_FALSE(HasFatalFailure());
    ASSERT_EQ(h.scheduler.pages().free_count(), o.num_blocks);
    ASSERT_EQ(h.finished + aborted, static_cast<int>(h.sequences.size()));
    preemptions += h.scheduler.stats().preemptions;
    copies += h.scheduler.stats().page_copies;
    shared += h.scheduler.stats().shared_tokens;
  }
  EXPECT_GT(preemptions, 100);
  EXPECT_GT(copies, 100);
  EXPECT_GT(shared, 1000);
}

}  // namespace
}  // namespace lockstep::rollout
