-- What the wrk scripts share: failures are counted, the first is kept, and done() prints one JSON line.
-- Globals on purpose: wrk reads a thread's variables by their name, and only after the run.

local report = {}
local threads = {}

succeeded, failures, first_failure = 0, 0, ""

function report.fail(status, body)
  failures = failures + 1
  if first_failure == "" then
    first_failure = status .. " " .. body:sub(1, 200)
  end
end

function setup(thread)
  table.insert(threads, thread)
  thread:set("number", #threads)
end

local function escaped(text)
  return (text:gsub('[%c"\\]', function(c) return string.format("\\u%04x", c:byte()) end))
end

function done(summary, latency, requests)
  local good, bad, first = 0, 0, ""
  for _, thread in ipairs(threads) do
    good, bad = good + thread:get("succeeded"), bad + thread:get("failures")
    if first == "" then first = thread:get("first_failure") end
  end
  local errors = summary.errors
  local broken = errors.connect + errors.read + errors.write + errors.timeout
  if broken > 0 then
    bad = bad + broken
    first = string.format("%s (connect %d, read %d, write %d, timeout %d)", first,
      errors.connect, errors.read, errors.write, errors.timeout)
  end
  print(string.format('{"requests":%d,"succeeded":%d,"seconds":%.6f,"p50":%.3f,"p99":%.3f,"failures":%d,"first":"%s"}',
    summary.requests, good, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    bad, escaped(first)))
end

-- The project of a pool, as bench.py names it too.
function report.project(pool)
  return string.format("%08d-0000-4000-8000-000000000000", pool)
end

return report
