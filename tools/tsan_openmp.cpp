// Tells ThreadSanitizer what libgomp orders. libgomp is not instrumented, so the sanitizer sees
// neither the start nor the end of a parallel region, nor a barrier, and would report every value
// that crosses one. The linker sends the calls that GCC emits through here (--wrap in
// CMakeLists.txt); only sanitized builds hold this file. What one thread of a region does to
// another's memory stays unordered, so a real race is found: tests/sanitizer/openmp_race.cpp.
#include <sanitizer/tsan_interface.h>

namespace {

// One parallel region; the addresses of its members are the sanitizer's synchronisation objects.
struct Team {
  void (*body)(void*);
  void* data;
  char start, barrier, end;
};

thread_local Team* current_team = nullptr;

void run_in_team(void* argument) {
  auto* team = static_cast<Team*>(argument);
  __tsan_acquire(&team->start);
  Team* const outer = current_team;
  current_team = team;
  team->body(team->data);
  current_team = outer;
  __tsan_release(&team->end);
}

void at_barrier(void (*wait)()) {
  Team* const team = current_team;
  if (team != nullptr) __tsan_release(&team->barrier);
  wait();
  if (team != nullptr) __tsan_acquire(&team->barrier);
}

}  // namespace

extern "C" {

void __real_GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
void __real_GOMP_barrier();
void __real_GOMP_loop_end();
void __real_GOMP_critical_name_start(void** name);
void __real_GOMP_critical_name_end(void** name);

void __wrap_GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags) {
  Team team{body, data, 0, 0, 0};
  __tsan_release(&team.start);
  __real_GOMP_parallel(run_in_team, &team, threads, flags);
  __tsan_acquire(&team.end);
}

void __wrap_GOMP_barrier() { at_barrier(__real_GOMP_barrier); }
void __wrap_GOMP_loop_end() { at_barrier(__real_GOMP_loop_end); }

void __wrap_GOMP_critical_name_start(void** name) {
  __real_GOMP_critical_name_start(name);
  __tsan_acquire(name);
}

void __wrap_GOMP_critical_name_end(void** name) {
  __tsan_release(name);
  __real_GOMP_critical_name_end(name);
}

}  // extern "C"
