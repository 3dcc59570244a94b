-- Drops the next slice of the entries of dead slots, and buckets that are no longer needed.
--
-- A round takes the slots that are dead when it begins and visits the buckets in ascending order. A split
-- moves entries only to a new last bucket, which the round has still to visit; buckets are merged only
-- between rounds. So any number of sweepers may take turns at it.
--
-- KEYS[1]  directory of the pool
-- ARGV     most buckets to visit
-- Returns  number of dead slots that are not free yet

local budget = tonumber(ARGV[1])
local now = now_ms()
purge(now)

for _, slot in ipairs(to_slots(read_set('members'))) do
  local expires, lease_ms = unpack_from('<dI4', read_row(slot))
  if expires + (ABANDONED_AFTER_LEASES - 1) * lease_ms <= now then
    fence(slot, 'fenced', 'silent for ' .. ABANDONED_AFTER_LEASES .. ' leases')
  end
end

local directory = redis.call('HMGET', DIRECTORY, 'buckets', 'entries', 'cursor', 'sweeping', 'dead')
local num_buckets, num_entries = tonumber(directory[1]) or 1, tonumber(directory[2]) or 0
local cursor, sweeping, dead = tonumber(directory[3]) or 0, directory[4] or '', directory[5] or ''
if sweeping == '' then
  sweeping, dead, cursor = dead, '', 0
end

local gone = to_words(sweeping)
local kept_of = {}

local function sweep_bucket(bucket)
  local flat = redis.call('HGETALL', bucket_key(bucket))
  local kept, changed = {}, false
  for at = 1, #flat, 2 do
    local set = flat[at + 1]
    kept_of[set] = kept_of[set] or to_set(without(to_words(set), gone))
    changed = changed or kept_of[set] ~= set
    if kept_of[set] ~= '' then
      kept[#kept + 1] = flat[at]
      kept[#kept + 1] = kept_of[set]
    end
  end
  if changed then
    write_bucket(bucket, kept)
    num_entries = num_entries - (#flat - #kept) / 2
  end
end

local function merge_last()
  local last = num_buckets - 1
  local into = last - power_within(last)
  local flat = redis.call('HGETALL', bucket_key(last))
  if #flat > 0 then
    redis.call('HSET', bucket_key(into), unpack(flat))
    redis.call('DEL', bucket_key(last))
  end
  num_buckets = last
end

if sweeping ~= '' then
  local stop = math.min(cursor + budget, num_buckets)
  for bucket = cursor, stop - 1 do
    sweep_bucket(bucket)
  end
  cursor = stop
  if cursor == num_buckets then
    for _, slot in ipairs(to_slots(gone)) do
      note_event('swept', slot, '', '', '')
    end
    sweeping = ''
  end
else
  while budget > 0 and num_buckets > 1 and num_entries < ENTRIES_PER_BUCKET / 4 * num_buckets do
    merge_last()
    budget = budget - 1
  end
end

redis.call('HSET', DIRECTORY, 'buckets', num_buckets, 'entries', num_entries, 'cursor', cursor,
  'sweeping', sweeping, 'dead', dead)
if sweeping == '' and dead == '' and #read_set('members') == 0 then
  redis.call('EXPIRE', LOG, LOG_LEFT_S)
  redis.call('EXPIRE', REMOVALS, LOG_LEFT_S)
end
return #to_slots(to_words(dead)) + #to_slots(to_words(sweeping))
