// Decides what runs: pure host logic, no model. The engine asks for a plan, runs it, commits it,
// and reports which sequences are finished.
//
// One plan, in this order:
//  1. Every running sequence that lacks one token (a decode) gets it, in order of arrival. When the
//     pages run out, the latest arrival that holds pages gives all of them up and computes them
//     again later; what it has sampled stays.
//  2. Running sequences that lack more (prompts, or tokens after a preemption) get chunks, in order
//     of arrival, as far as max_num_batched_tokens and prefill_chunk allow.
//  3. Waiting sequences are admitted in order of arrival while max_num_seqs, the token budget and
//     the pages for all their tokens allow, keeping one page free for each running sequence. A
//     sequence whose prompt is being computed by another waits for that one, keeping its place.
//
// Every plan of a scheduler with unfinished sequences makes progress: the earliest arrival never
// gives up pages to another, and what no pool could hold is refused before it gets here.
#pragma once

#include <memory>
#include <set>
#include <unordered_map>
#include <vector>

#include "rollout/kv_pages.h"
#include "rollout/options.h"
#include "rollout/sequence.h"

namespace lockstep::rollout {

// Tokens [begin, begin + count) of a sequence run in this step.
struct StepItem {
  Sequence* sequence;
  std::int64_t begin, count;
};

// The first `rows` rows of page `source` go to page `target`. Copies run in order, before the
// forward.
struct PageCopy {
  std::int32_t source, target;
  std::int64_t rows;
};

// `sequence` samples its next token from the last row of items[item]; that item belongs to the
// sequence itself or to the leader that computed its prompt.
struct Draw {
  Sequence* sequence;
  std::int64_t item;
};

struct StepPlan {
  std::vector<StepItem> items;
  std::vector<PageCopy> copies;
  std::vector<Draw> draws;
  std::int64_t tokens = 0;
};

struct SchedulerStats {
  std::int64_t preemptions = 0;    // running sequences that gave up their pages
  std::int64_t shared_tokens = 0;  // not computed because another sequence had them
  std::int64_t page_copies = 0;
};

class Scheduler {
 public:
  // options.num_blocks is the number of pages and must be positive here.
  explicit Scheduler(const Options& options);

  // The sequence stays the caller's and must live until finish(). Its max_length must fit the pages
  // (needed_pages).
  void add(Sequence& sequence);
  // Fills `plan`; empty only when nothing is unfinished.
  void schedule(StepPlan& plan);
  // After the plan ran: its tokens are computed. Sequences that drew from their leader share its
  // pages. The caller then appends the drawn tokens and finishes what ended.
  void commit(const StepPlan& plan);
  // Gives back everything the sequence holds, in whatever state it is.
  void finish(Sequence& sequence);

  // Pages that a sequence of this final length needs; its last token is never computed.
  std::int64_t needed_pages(std::int64_t max_length) const;
  std::int64_t unfinished() const {
    return static_cast<std::int64_t>(running_.size() + waiting_.size());
  }
  std::int64_t running() const { return static_cast<std::int64_t>(running_.size()); }
  const KvPages& pages() const { return pages_; }
  const SchedulerStats& stats() const { return stats_; }

 private:
  struct ByArrival {
    bool operator()(const Sequence* a, const Sequence* b) const { return a->id < b->id; }
  };
  struct TokensHash {
    std::size_t operator()(const std::vector<std::int32_t>& tokens) const;
  };

  std::int64_t pages_for(std::int64_t tokens) const {
    return (tokens + options_.block_size - 1) / options_.block_size;
  }
  void schedule_decodes(StepPlan& plan);
  void schedule_chunks(StepPlan& plan);
  void admit_waiting(StepPlan& plan);
  void run(StepPlan& plan, Sequence& sequence, std::int64_t count);
  bool make_room_for_decode(StepPlan& plan, Sequence& sequence);
  bool admit(StepPlan& plan, Sequence& sequence);
  std::int64_t missing_pages(const Sequence& sequence, std::int64_t computed,
                             const Sequence* donor) const;
  void own_last_page(StepPlan& plan, Sequence& sequence);
  void share_pages(const Sequence& donor, Sequence& sequence, std::int64_t tokens);
  void drop_pages(Sequence& sequence);
  void preempt(Sequence& sequence);
  Sequence* latest_holder(const Sequence* except) const;
  void erase_running(const Sequence& sequence);

  Options options_;
  KvPages pages_;
  std::vector<Sequence*> running_;          // by arrival
  std::set<Sequence*, ByArrival> waiting_;  // some may hold their prompt's pages already
  std::set<Sequence*, ByArrival> holders_;  // all that hold pages
  std::unordered_map<std::vector<std::int32_t>, PromptGroup, TokensHash> groups_;
  std::int64_t budget_ = 0;
  SchedulerStats stats_;
};

}  // namespace lockstep::rollout
