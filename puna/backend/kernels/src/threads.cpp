#include "threads.h"

#include <unistd.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace puna {
namespace {

// Helpers spin for about this long before they sleep: the next product of a token comes soon.
constexpr int kSpins = 2000;

class Pool {
 public:
  explicit Pool(int helpers) : size_(helpers), process_(getpid()) {
    for (int i = 0; i < helpers; ++i) threads_.emplace_back([this, i] { help(i); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ends_ = true;
      turn_.fetch_add(1);
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  int size() const { return size_; }
  bool is_of_this_process() const { return process_ == getpid(); }

  void run(int helpers, void (*task)(void*), void* data) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = task, data_ = data, wanted_ = helpers;
      working_.store(size_);
      turn_.fetch_add(1);
    }
    wake_.notify_all();
    task(data);
    while (working_.load(std::memory_order_acquire) > 0) pause();
  }

 private:
  void help(int which) {
    for (uint64_t seen = 0;;) {
      int spins = 0;
      while (turn_.load(std::memory_order_acquire) == seen && ++spins < kSpins) pause();
      if (turn_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return turn_.load() != seen; });
      }
      ++seen;
      if (ends_) return;
      if (which < wanted_) task_(data_);
      working_.fetch_sub(1, std::memory_order_release);
    }
  }

  const int size_;
  const pid_t process_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
  std::atomic<uint64_t> turn_{0};
  std::atomic<int> working_{0};
  void (*task_)(void*) = nullptr;
  void* data_ = nullptr;
  int wanted_ = 0;
  bool ends_ = false;
};

std::mutex one_at_a_time;
std::unique_ptr<Pool> pool;

}  // namespace

void run_own(void*, int helpers, void (*task)(void*), void* data) {
  std::unique_lock<std::mutex> turn(one_at_a_time, std::try_to_lock);
  if (!turn.owns_lock()) return task(data);
  if (pool && !pool->is_of_this_process()) pool.release();  // a fork has no threads to join
  if (!pool || pool->size() < helpers) pool.reset(new Pool(helpers));
  pool->run(helpers, task, data);
}

}  // namespace puna

extern "C" void puna_run_gomp(void* context, int helpers, void (*task)(void*), void* data) {
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  reinterpret_cast<Parallel>(context)(task, data, unsigned(helpers) + 1, 0);
}
