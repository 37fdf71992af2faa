#include "rollout/scheduler.h"

#include <algorithm>

#include "base/error.h"

namespace lockstep::rollout {
namespace {

bool prompt_is_computed(const Sequence& sequence) {
  return sequence.computed >= sequence.prompt_length;
}

}  // namespace

Scheduler::Scheduler(const Options& options)
    : options_(options), pages_(options.num_blocks, options.shuffle_pages) {
  LOCKSTEP_CHECK(options.max_num_seqs >= 1 && options.block_size >= 1 &&
                     options.max_num_batched_tokens >= 1 && options.prefill_chunk >= 0,
                 "max_num_seqs {}, block_size {}, max_num_batched_tokens {}, prefill_chunk {}",
                 options.max_num_seqs, options.block_size, options.max_num_batched_tokens,
                 options.prefill_chunk);
}

std::size_t Scheduler::TokensHash::operator()(const std::vector<std::int32_t>& tokens) const {
  std::uint64_t hash = 0x9E3779B97F4A7C15ull ^ tokens.size();
  for (const std::int32_t token : tokens) {
    hash = (hash ^ static_cast<std::uint32_t>(token)) * 0xFF51AFD7ED558CCDull;
    hash ^= hash >> 32;
  }
  return hash;
}

std::int64_t Scheduler::needed_pages(std::int64_t max_length) const {
  return pages_for(max_length - 1);
}

void Scheduler::add(Sequence& sequence) {
  LOCKSTEP_CHECK(sequence.status == Status::kWaiting && sequence.pages.empty() &&
                     sequence.prompt_length >= 1 && sequence.length() < sequence.max_length,
                 "sequence {} cannot be added: prompt {}, length {}, max length {}", sequence.id,
                 sequence.prompt_length, sequence.length(), sequence.max_length);
  LOCKSTEP_CHECK(needed_pages(sequence.max_length) <= pages_.count(),
                 "sequence {} of up to {} tokens does not fit {} pages of {}", sequence.id,
                 sequence.max_length, pages_.count(), options_.block_size);
  const bool inserted = waiting_.insert(&sequence).second;
  LOCKSTEP_CHECK(inserted, "two sequences with arrival {}", sequence.id);
  if (!options_.enable_prefix_sharing) return;
  sequence.group = &groups_[sequence.request.prompt];
  sequence.group->members.push_back(&sequence);
}

void Scheduler::schedule(StepPlan& plan) {
  plan.items.clear();
  plan.copies.clear();
  plan.draws.clear();
  plan.tokens = 0;
  budget_ = options_.max_num_batched_tokens;
  schedule_decodes(plan);
  schedule_chunks(plan);
  admit_waiting(plan);
  stats_.page_copies += static_cast<std::int64_t>(plan.copies.size());
}

void Scheduler::schedule_decodes(StepPlan& plan) {
  // Victims are never earlier than the sequence at hand, so nothing in the plan loses its pages.
  for (std::size_t i = 0; i < running_.size() && budget_ > 0;) {
    Sequence& sequence = *running_[i];
    if (sequence.length() - sequence.computed == 1) {
      if (!make_room_for_decode(plan, sequence)) continue;  // it left running_
      run(plan, sequence, 1);
    }
    ++i;
  }
}

void Scheduler::schedule_chunks(StepPlan& plan) {
  for (Sequence* sequence : running_) {
    if (budget_ == 0) break;
    const std::int64_t missing = sequence->length() - sequence->computed;
    if (missing > 1) run(plan, *sequence, missing);
  }
}

void Scheduler::admit_waiting(StepPlan& plan) {
  std::int64_t places = options_.max_num_seqs - running();
  for (auto it = waiting_.begin(); it != waiting_.end() && places > 0 && budget_ > 0; --places) {
    Sequence& sequence = **it++;
    if (sequence.pages.empty() && sequence.group != nullptr && sequence.group->leader != nullptr)
      continue;
    if (!admit(plan, sequence)) break;
    run(plan, sequence, sequence.length() - sequence.computed);
  }
}

// Puts up to `count` tokens of a sequence that has the pages for them into the plan.
void Scheduler::run(StepPlan& plan, Sequence& sequence, std::int64_t count) {
  count = std::min(count, budget_);
  if (options_.prefill_chunk > 0) count = std::min<std::int64_t>(count, options_.prefill_chunk);
  const auto item = static_cast<std::int64_t>(plan.items.size());
  plan.items.push_back({&sequence, sequence.computed, count});
  plan.tokens += count;
  budget_ -= count;
  if (sequence.computed + count < sequence.length()) return;
  plan.draws.push_back({&sequence, item});
  if (sequence.group == nullptr || sequence.group->leader != &sequence ||
      sequence.response_length() > 0)
    return;
  for (Sequence* member : sequence.group->members)
    if (member->status == Status::kWaiting && member->response_length() == 0)
      plan.draws.push_back({member, item});
}

// Makes sure that the sequence's next token has a page of its own; false if the sequence itself had
// to give up its pages.
bool Scheduler::make_room_for_decode(StepPlan& plan, Sequence& sequence) {
  const auto page = static_cast<std::size_t>(sequence.computed / options_.block_size);
  const auto lacks_page = [&] {
    return page == sequence.pages.size() || pages_.holders(sequence.pages[page]) > 1;
  };
  while (lacks_page() && pages_.free_count() == 0) {
    Sequence* victim = latest_holder(nullptr);
    preempt(*victim);
    if (victim == &sequence) return false;
  }
  if (page == sequence.pages.size())
    sequence.pages.push_back(pages_.allocate());
  else
    own_last_page(plan, sequence);
  return true;
}

// Moves a waiting sequence to running_ with pages for all its tokens, if there is room.
bool Scheduler::admit(StepPlan& plan, Sequence& sequence) {
  const Sequence* donor = nullptr;
  if (sequence.pages.empty() && sequence.group != nullptr)
    for (const Sequence* member : sequence.group->members)
      if (donor == nullptr && !member->pages.empty()) donor = member;
  // The last token is always computed by the sequence itself: it needs the logits.
  const std::int64_t computed = donor != nullptr
                                    ? std::min(sequence.prompt_length, sequence.length() - 1)
                                    : sequence.computed;
  if (!running_.empty() &&
      missing_pages(sequence, computed, donor) + running() > pages_.free_count())
    return false;
  if (donor != nullptr) share_pages(*donor, sequence, computed);
  // With nothing running the earliest arrival may take the pages of all that wait.
  while (missing_pages(sequence, computed, nullptr) > pages_.free_count()) {
    Sequence* victim = latest_holder(&sequence);
    LOCKSTEP_CHECK(victim != nullptr, "sequence {} lacks pages with all others free", sequence.id);
    preempt(*victim);
  }
  if (computed % options_.block_size != 0) own_last_page(plan, sequence);
  sequence.pages.reserve(pages_for(sequence.max_length));
  while (static_cast<std::int64_t>(sequence.pages.size()) < pages_for(sequence.length()))
    sequence.pages.push_back(pages_.allocate());
  holders_.insert(&sequence);
  waiting_.erase(&sequence);
  sequence.status = Status::kRunning;
  running_.insert(std::upper_bound(running_.begin(), running_.end(), &sequence, ByArrival()),
                  &sequence);
  if (sequence.group != nullptr && !prompt_is_computed(sequence))
    sequence.group->leader = &sequence;
  return true;
}

// Free pages that `sequence` needs for all its tokens when the first `computed` lie in its own
// pages, or in those of a donor that it will share.
std::int64_t Scheduler::missing_pages(const Sequence& sequence, std::int64_t computed,
                                      const Sequence* donor) const {
  const std::vector<std::int32_t>& pages = donor != nullptr ? donor->pages : sequence.pages;
  const std::int64_t held = pages_for(computed);
  const bool copies_last = computed % options_.block_size != 0 &&
                           (donor != nullptr || pages_.holders(pages[held - 1]) > 1);
  return pages_for(sequence.length()) - held + (copies_last ? 1 : 0);
}

// Copy on write: the page that holds the sequence's last computed token becomes its own.
void Scheduler::own_last_page(StepPlan& plan, Sequence& sequence) {
  std::int32_t& page = sequence.pages[sequence.computed / options_.block_size];
  if (pages_.holders(page) == 1) return;
  const std::int32_t target = pages_.allocate();
  plan.copies.push_back({page, target, sequence.computed % options_.block_size});
  pages_.release(page);
  page = target;
}

void Scheduler::share_pages(const Sequence& donor, Sequence& sequence, std::int64_t tokens) {
  const std::int64_t count = pages_for(tokens);
  sequence.pages.assign(donor.pages.begin(), donor.pages.begin() + count);
  for (const std::int32_t page : sequence.pages) pages_.share(page);
  sequence.computed = tokens;
  stats_.shared_tokens += tokens;
  if (count > 0) holders_.insert(&sequence);
}

void Scheduler::commit(const StepPlan& plan) {
  for (const StepItem& item : plan.items) {
    Sequence& sequence = *item.sequence;
    sequence.computed += item.count;
    if (sequence.group != nullptr && sequence.group->leader == &sequence &&
        prompt_is_computed(sequence))
      sequence.group->leader = nullptr;
  }
  for (const Draw& draw : plan.draws) {
    const Sequence& leader = *plan.items[draw.item].sequence;
    if (draw.sequence != &leader) share_pages(leader, *draw.sequence, leader.prompt_length);
  }
}

void Scheduler::finish(Sequence& sequence) {
  if (sequence.status == Status::kRunning) erase_running(sequence);
  if (sequence.status == Status::kWaiting) waiting_.erase(&sequence);
  drop_pages(sequence);
  sequence.status = Status::kFinished;
  if (sequence.group == nullptr) return;
  std::erase(sequence.group->members, &sequence);
  if (sequence.group->members.empty()) groups_.erase(sequence.request.prompt);
  sequence.group = nullptr;
}

void Scheduler::drop_pages(Sequence& sequence) {
  if (!sequence.pages.empty()) holders_.erase(&sequence);
  for (const std::int32_t page : sequence.pages) pages_.release(page);
  sequence.pages.clear();
  sequence.computed = 0;
  if (sequence.group != nullptr && sequence.group->leader == &sequence)
    sequence.group->leader = nullptr;
}

void Scheduler::preempt(Sequence& sequence) {
  drop_pages(sequence);
  if (sequence.status != Status::kRunning) return;
  erase_running(sequence);
  sequence.status = Status::kWaiting;
  waiting_.insert(&sequence);
  ++stats_.preemptions;
}

Sequence* Scheduler::latest_holder(const Sequence* except) const {
  auto it = holders_.rbegin();
  if (it != holders_.rend() && *it == except) ++it;
  return it == holders_.rend() ? nullptr : *it;
}

void Scheduler::erase_running(const Sequence& sequence) {
  const auto it = std::lower_bound(running_.begin(), running_.end(), &sequence, ByArrival());
  LOCKSTEP_CHECK(it != running_.end() && *it == &sequence, "sequence {} is not running",
                 sequence.id);
  running_.erase(it);
}

}  // namespace lockstep::rollout
