// Work in numbered pieces, taken by as many threads as there are.

#ifndef PUNA_THREADS_H_
#define PUNA_THREADS_H_

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "kernels.h"

namespace puna {

// Waits a little, where another thread is about to be done.
inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Threads of our own, for a caller that has none to lend. Busy with another call, they are not
// waited for: the caller works alone.
void run_own(void* context, int helpers, void (*task)(void*), void* data);

// `body(i)` for every i below `count`, in any order, on several threads.
template <typename Body>
void parallel(const PunaThreads& threads, int64_t count, const Body& body) {
  struct Work {
    std::atomic<int64_t> next{0};
    int64_t count;
    const Body& body;
  } work{{}, count, body};
  auto take = [](void* data) {
    Work& work = *static_cast<Work*>(data);
    for (int64_t i; (i = work.next.fetch_add(1, std::memory_order_relaxed)) < work.count;)
      work.body(i);
  };
  int helpers = int(std::min<int64_t>(threads.threads, count)) - 1;
  if (helpers < 1)
    take(&work);
  else
    (threads.run == nullptr ? run_own : threads.run)(threads.context, helpers, take, &work);
}

}  // namespace puna

#endif  // PUNA_THREADS_H_
