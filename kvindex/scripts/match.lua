-- Finds who holds how much of a prompt, and how loaded every worker is. Writes nothing.
--
-- Along a prompt the set of holders changes only where some worker's run of blocks ends. So the changes
-- are looked for: a stretch with equal sets at both ends is skipped, any other is halved. Sets are
-- compared and never read: that is left to the caller, of whom there are many.
--
-- KEYS[1]  directory of the pool
-- ARGV     hashes to probe, 8 bytes each, in prompt order
-- Returns  {the holders of every probe before a change and of the last probe, ascending (STEP of keys.py,
--          then the set); what `pending` returns; what `fleet` returns}

local probes = ARGV[1]
local num_probes = #probes / 8
local num_buckets = tonumber(redis.call('HGET', DIRECTORY, 'buckets')) or 1
local power = power_within(num_buckets)
local steps = {}

local function holders(index)
  local hash = probes:sub(8 * index - 7, 8 * index)
  return redis.call('HGET', bucket_key(bucket_of(hash, num_buckets, power)), hash) or ''
end

local function report(index, set)
  steps[#steps + 1] = pack('<I2I2', index, #set) .. set
end

-- `low` holds probe `before` and `high`, which is another set, holds probe `behind`.
local function search(before, low, behind, high)
  if behind - before == 1 then
    return report(before, low)
  end
  local middle = floor((before + behind) / 2)
  local set = holders(middle)
  if set ~= low then
    search(before, low, middle, set)
  end
  if set ~= high then
    search(middle, set, behind, high)
  end
end

if num_probes > 0 then
  local first, last = holders(1), holders(num_probes)
  if first ~= last then
    search(1, first, num_probes, last)
  end
  report(num_probes, last)
end
return {table.concat(steps), pending(), fleet(now_ms())}
