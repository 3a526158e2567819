// Runs a list of phases, each a number of independent units, on a few threads. Knows nothing of models.
//
// A phase ends when its units are done, not when every thread has arrived: a thread that the kernel has put
// aside holds nobody up unless it holds a unit, so the step survives sharing its cores with other processes.
// Idle threads spin for some microseconds, then sleep. With one thread nothing is synchronised at all.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu_vector.h"

namespace diptych {

struct Phase {
  int kind;
  int layer;
  int units;
};

// What a team works on. `finish_phase` runs once, on one thread, after the last unit of a phase.
class Job {
 public:
  virtual ~Job() = default;
  virtual void enter(int thread) = 0;
  virtual void run_unit(const Phase& phase, int unit, int thread) = 0;
  virtual void finish_phase(const Phase& phase) = 0;
  virtual void leave(int thread) = 0;
};

class Team {
 public:
  explicit Team(int num_threads) : num_threads_(num_threads) {
    for (int thread = 1; thread < num_threads; thread++) helpers_.emplace_back([this, thread] { help(thread); });
  }

  ~Team() {
    {
      std::lock_guard<std::mutex> hold(mutex_);
      closing_ = true;
    }
    changed_.notify_all();
    for (std::thread& helper : helpers_) helper.join();
  }

  int num_threads() const { return num_threads_; }

  void run(Job& job, const std::vector<Phase>& phases) {
    if (phases.empty()) return;
    if (num_threads_ == 1) return run_alone(job, phases);
    {
      std::lock_guard<std::mutex> hold(mutex_);
      job_ = &job;
      phases_ = &phases;
      done_.store(0);
      state_.store(0);
      running_ = true;
    }
    changed_.notify_all();
    job.enter(0);
    while (!finished()) {
      work(0);
      if (!finished()) sleep_until_work();
    }
    job.leave(0);
    std::unique_lock<std::mutex> hold(mutex_);
    running_ = false;
    left_.wait(hold, [this] { return inside_ == 0; });
  }

 private:
  static constexpr int kSpins = 600;  // pauses of 50 to 140 cycles: about 20 microseconds

  static void run_alone(Job& job, const std::vector<Phase>& phases) {
    job.enter(0);
    for (const Phase& phase : phases) {
      for (int unit = 0; unit < phase.units; unit++) job.run_unit(phase, unit, 0);
      job.finish_phase(phase);
    }
    job.leave(0);
  }

  // The state is (phase, next unit) in one word, so that a unit cannot be taken from a phase that has ended.
  static uint32_t phase_of(uint64_t state) { return (uint32_t)(state >> 32); }
  static uint32_t unit_of(uint64_t state) { return (uint32_t)state; }

  bool finished() const { return phase_of(state_.load()) == phases_->size(); }
  bool has_work(uint64_t state) const {
    return phase_of(state) == phases_->size() || (int)unit_of(state) < (*phases_)[phase_of(state)].units;
  }

  // Takes units until the job is finished or nothing could be taken for a while.
  void work(int thread) {
    int idle = 0;
    while (idle < kSpins) {
      uint64_t state = state_.load(std::memory_order_acquire);
      if (phase_of(state) == phases_->size()) return;
      const Phase& phase = (*phases_)[phase_of(state)];
      if ((int)unit_of(state) >= phase.units) {
        idle++;
        relax();
        continue;
      }
      if (!state_.compare_exchange_weak(state, state + 1)) continue;
      idle = 0;
      job_->run_unit(phase, unit_of(state), thread);
      if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == phase.units) advance(phase, phase_of(state));
    }
  }

  void advance(const Phase& phase, uint32_t index) {
    job_->finish_phase(phase);
    done_.store(0, std::memory_order_relaxed);
    state_.store((uint64_t)(index + 1) << 32);
    if (sleepers_.load() == 0) return;
    { std::lock_guard<std::mutex> hold(mutex_); }
    changed_.notify_all();
  }

  void sleep_until_work() {
    std::unique_lock<std::mutex> hold(mutex_);
    sleepers_.fetch_add(1);
    changed_.wait(hold, [this] { return has_work(state_.load()); });
    sleepers_.fetch_sub(1);
  }

  void help(int thread) {
    std::unique_lock<std::mutex> hold(mutex_);
    for (;;) {
      sleepers_.fetch_add(1);
      changed_.wait(hold, [this] {
        return closing_ || (running_ && phase_of(state_.load()) != phases_->size() && has_work(state_.load()));
      });
      sleepers_.fetch_sub(1);
      if (closing_) return;
      inside_++;
      hold.unlock();
      job_->enter(thread);
      work(thread);
      job_->leave(thread);
      hold.lock();
      if (--inside_ == 0) left_.notify_all();
    }
  }

  const int num_threads_;
  std::vector<std::thread> helpers_;
  std::mutex mutex_;
  std::condition_variable changed_, left_;
  bool closing_ = false, running_ = false;
  int inside_ = 0;  // helpers that may touch the job; guarded by mutex_
  Job* job_ = nullptr;
  const std::vector<Phase>* phases_ = nullptr;
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<int> done_{0};
  std::atomic<int> sleepers_{0};
};

}  // namespace diptych
